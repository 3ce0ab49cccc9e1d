"""The tables in a manifest: tensors, graphs and files; all are checked when they are built."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from wire import checks, costs
from wire.costs import LayerCost, NodeCosts

MANIFEST = "manifest.json"
MAX_FILE_BYTES = 2 << 30
MAX_TENSORS = 4096
MAX_VALUES = 1 << 28

Role = Literal["batch", "setting", "metric", "result", "parameter", "buffer", "optimizer"]
STATE_ROLES = ("parameter", "buffer", "optimizer")

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9_-]{1,32}){0,3}")
NAME = re.compile(r"[!-~]{1,256}")
_RANGE = re.compile(r"(state|next)\[(0|[1-9][0-9]{0,9}):([1-9][0-9]{0,9})\]")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: name, static shape, type and role."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]
    role: Role

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"tensor name: expected 1 to 256 printable, got {self.name!r:.80}")
        check_shape(f"tensor {self.name!r}", self.shape, 0, 8)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Graph:
    """One ONNX file, and what goes in and out of it.

    Attributes:
        file: its name.
        inputs, outputs: exactly those that the file has.
        flops: 2 x multiply-adds, for one run of the graph.
        layers, nodes: what a run costs; see `wire.costs`.
    """

    file: str
    flops: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[LayerCost, ...]
    nodes: NodeCosts

    def __post_init__(self) -> None:
        check_file(self.file)
        check_names(f"inputs of {self.file}", self.inputs)
        check_names(f"outputs of {self.file}", self.outputs)
        costs.check(self.layers, self.nodes, flops=self.flops)


@dataclass(frozen=True)
class FileRef:
    """A file by its content."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        checks.digest("sha256", self.sha256)
        checks.within("bytes", self.bytes, 1, MAX_FILE_BYTES)


def check_file(name: str) -> None:
    """Raise ValueError unless an artifact may hold a file of this name."""
    if not _FILE.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"file name: expected a plain name, got {name!r:.80}")


def check_shape(what: str, shape: tuple[int, ...], least: int, most: int) -> None:
    """Raise ValueError unless the shape has `least` to `most` axes, and values but not too many."""
    checks.within(what, len(shape), least, most, " axes")
    if any(n < 1 for n in shape) or math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{what}: shape {shape!r:.80} is empty or over {MAX_VALUES} values")


def is_range(name: str) -> bool:
    """Whether a tensor of this name is a range of the state vector: `state[0:12]`, `next[0:12]`."""
    return _RANGE.fullmatch(name) is not None


def range_of(word: Literal["state", "next"], spec: TensorSpec) -> tuple[int, int] | None:
    """Start and stop of a tensor named, for instance, `next[0:12]`, with just as many values.

    None for any other tensor.
    """
    match = _RANGE.fullmatch(spec.name)
    if match is None or match[1] != word or spec.dtype != "float32":
        return None
    start, stop = int(match[2]), int(match[3])
    return (start, stop) if stop - start == spec.size > 0 else None


def check_names(what: str, specs: tuple[TensorSpec, ...]) -> None:
    """Raise ValueError unless the tensors have different names, and are not too many."""
    if len(specs) > 2 * MAX_TENSORS:
        raise ValueError(f"{what}: {len(specs)} tensors, limit {2 * MAX_TENSORS}")
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError(f"{what}: two tensors have one name")


def expect(what: str, got: tuple[TensorSpec, ...], expected: list[TensorSpec]) -> None:
    """Raise ValueError unless these are the expected tensors, in any order."""
    if set(got) != set(expected):
        odd = min(set(got) ^ set(expected), key=lambda spec: spec.name)
        side = "unexpected or ill-shaped" if odd in got else "missing or ill-shaped"
        raise ValueError(f"{what}: {side} {odd.name!r} {odd.dtype} {list(odd.shape)} {odd.role}")
