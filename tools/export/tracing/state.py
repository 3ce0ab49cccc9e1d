"""The state as one vector, and the pieces that the optimizer updates one by one.

Parameters, buffers and optimizer tensors lie flat, one after the other (wire/manifest/). To
update each tensor by itself would take a handful of nodes for each, most of them for a few dozen
values. To update all at once would stream millions of values through memory once an operation. A
piece is a run of small tensors, or some rows of a large one: few enough values that all operations
on them stay in the cache.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PIECES = "optim.piece"  # + number: a piece's name; no tensor of a module can have it
PIECE = 1 << 17  # values, half a megabyte


@dataclass(frozen=True)
class Tensors:
    """The module's tensors by role; `fixed` are buffers that no training step may change."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that the optimizer moves."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor, or all of it (rows None)."""

    name: str
    size: int
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part's values in a tensor, flat."""
        return (tensor if self.rows is None else tensor[slice(*self.rows)]).reshape(-1)


@dataclass(frozen=True)
class Piece:
    """A run of the state vector; `start` counts from the first trained parameter on."""

    key: str
    start: int
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(part.size for part in self.parts)

    def gradient(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The gradients of the piece's values, (size,)."""
        return torch.cat([part.of(grads[part.name]) for part in self.parts])


def pieces(tensors: Tensors) -> tuple[Piece, ...]:
    """The trained parameters in pieces of `PIECE` values at most, or of one row."""
    closed: list[Piece] = []
    waiting: list[Part] = []
    for part in _parts(tensors.trained):
        if part.rows is not None or sum(p.size for p in waiting) + part.size > PIECE:
            _close(closed, waiting)
        waiting.append(part)
        if part.rows is not None:
            _close(closed, waiting)
    _close(closed, waiting)
    return tuple(closed)


def _close(closed: list[Piece], waiting: list[Part]) -> None:
    """Make a piece of the parts that wait for one."""
    if waiting:
        start = closed[-1].start + closed[-1].size if closed else 0
        closed.append(Piece(f"{PIECES}{len(closed)}", start, tuple(waiting)))
        waiting.clear()


def _parts(trained: Mapping[str, Tensor]) -> Iterator[Part]:
    for name, tensor in trained.items():
        size, length = tensor.numel(), len(tensor) if tensor.ndim else 1
        rows = max(1, PIECE * length // size)
        if size <= PIECE or rows >= length:
            yield Part(name, size)
            continue
        for first in range(0, length, rows):
            last = min(first + rows, length)
            yield Part(name, size // length * (last - first), (first, last))


def offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """The start of each tensor by name, if tensors of these sizes follow one another."""
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += size
    return starts


def span(word: str, start: int, size: int) -> str:
    """The name of a range of the state vector: "state" or "next", start:stop."""
    return f"{word}[{start}:{start + size}]"
