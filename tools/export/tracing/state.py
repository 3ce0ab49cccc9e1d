"""The state as one vector, and the pieces of it in which the optimizer walks over it.

Parameters, buffers and optimizer tensors lie flat, one after the other (wire/manifest/). An
optimizer that updated each tensor by itself would cost a handful of nodes for each, most of them
for a few dozen values; one that updated all at once would stream millions of values through memory
once an operation. A piece is a run of small tensors, or some rows of a large one: few enough values
that all operations on them stay in the cache.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

PIECES = "optim.piece"  # + number: the names of pieces, which no tensor of a module can have
PIECE = 1 << 17  # values, half a megabyte


@dataclass(frozen=True)
class Tensors:
    """The module's own tensors by role; `fixed` are buffers that no training step may change."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that the optimizer moves."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


@dataclass(frozen=True)
class Part:
    """Rows of one tensor, or (rows None) all of it."""

    name: str
    size: int
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The part's values, flat."""
        return (tensor if self.rows is None else tensor[slice(*self.rows)]).reshape(-1)


@dataclass(frozen=True)
class Piece:
    """Neighbours in the state vector, `start` from the first trained parameter on."""

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
    found: list[Piece] = []
    waiting: list[Part] = []
    for part in _parts(tensors.trained):
        if part.rows is not None or sum(p.size for p in waiting) + part.size > PIECE:
            _close(found, waiting)
        waiting.append(part)
        if part.rows is not None:
            _close(found, waiting)
    _close(found, waiting)
    return tuple(found)


def _close(found: list[Piece], waiting: list[Part]) -> None:
    if waiting:
        start = found[-1].start + found[-1].size if found else 0
        found.append(Piece(f"{PIECES}{len(found)}", start, tuple(waiting)))
        waiting.clear()


def _parts(trained: Mapping[str, Tensor]) -> Iterator[Part]:
    for name, tensor in trained.items():
        size, length = tensor.numel(), len(tensor) if tensor.ndim else 1
        step = max(1, PIECE * length // size)
        if size <= PIECE or step >= length:
            yield Part(name, size)
            continue
        for first in range(0, length, step):
            last = min(first + step, length)
            yield Part(name, size // length * (last - first), (first, last))


def offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """By name: where each begins, of tensors of these sizes in a row."""
    found, end = {}, 0
    for name, size in sizes.items():
        found[name] = end
        end += size
    return found


def span(word: str, start: int, size: int) -> str:
    """The name of a range of the state vector: "state" or "next", start:stop."""
    return f"{word}[{start}:{start + size}]"
