"""An artifact's manifest: its graphs, their inputs and outputs, the state and the files.

One step on a batch takes as many runs of train.onnx as there are micro-batches; a graph's own batch
B is that of one of them, and the step's loss and number of correct samples are the sums over them.

Inputs of train.onnx: `x` float32 (B, *input), `y` int64 (B), `lr` float32 (); for the task
`distill` also `teacher` float32 (B, classes), `alpha` and `temperature` float32 (); with several
micro-batches `first` and `last` float32 (), 1 in the first and in the last of them and 0 in others;
with a proximal term its weight `mu` float32 (); and of the state what it reads.

The state is one float32 vector: its tensors flat, one after the other in the order of the manifest.
An input that is a tensor has the tensor's name; one that is a range of the vector, across tensors
or within one, is called `state[start:stop]`. Outputs: `loss` and `correct`, float32 (), and the
ranges that the step changes, `next[start:stop]`; no two overlap. The tables hold exactly the inputs
that a graph has: one that it does not read is not there.

Roles: `batch` (x, y, teacher), `setting` (lr, alpha, temperature, first, last, mu), `metric` (loss,
correct), `result` (logits, features), and of the state `parameter`, `buffer`, `optimizer`.

The manifest comes from the network: names, sizes, shapes and types are checked before use, and its
JSON must be in canonical form (sorted keys, no spaces), so that one manifest has one digest.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from wire import classes, costs, records
from wire.costs import LayerCost, NodeCosts
from wire.errors import ArtifactError

FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "init.safetensors"
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 2 << 30
MAX_TENSORS = 4096
MAX_MICRO_BATCHES = 1024
MAX_VALUES = 1 << 28

Role = Literal["batch", "setting", "metric", "result", "parameter", "buffer", "optimizer"]
ANCHOR = "optim.anchor."  # + a parameter's name: what it was when training began
STATE_ROLES = ("parameter", "buffer", "optimizer")

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.[A-Za-z0-9_-]{1,32}){0,3}")
_NAME = re.compile(r"[!-~]{1,256}")
_RANGE = re.compile(r"(state|next)\[(0|[1-9][0-9]{0,9}):([1-9][0-9]{0,9})\]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: name, static shape, type and role."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"]
    role: Role

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"tensor name: expected 1 to 256 printable, got {self.name!r:.80}")
        _check_shape(f"tensor {self.name!r}", self.shape, 0, 8)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Graph:
    """One ONNX file and what goes in and out of it.

    Attributes:
        flops: 2 x multiply-adds, for one run of the graph.
        layers, nodes: what a run costs, see wire.costs.
    """

    file: str
    flops: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: tuple[LayerCost, ...]
    nodes: NodeCosts

    def __post_init__(self) -> None:
        _check_file(self.file)
        _check_names(f"inputs of {self.file}", self.inputs)
        _check_names(f"outputs of {self.file}", self.outputs)
        costs.check(self.layers, self.nodes, flops=self.flops)


@dataclass(frozen=True)
class FileRef:
    """A file by its content."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256: expected 64 hex digits, got {self.sha256!r:.80}")
        if not 0 < self.bytes <= MAX_FILE_BYTES:
            raise ValueError(f"bytes: expected 1 to {MAX_FILE_BYTES}, got {self.bytes}")


@dataclass(frozen=True)
class ModelInfo:
    """The network.

    Attributes:
        classes: how many logits it has.
        input: shape of one sample.
        keep_rate: of a sub-model; 1 for the whole network.
        class_names: in the order of the logits; none where labels are numbers alone.
    """

    name: str
    classes: int
    input: tuple[int, ...]
    keep_rate: float
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"model name: expected 1 to 256 printable, got {self.name!r:.80}")
        if not 2 <= self.classes <= 1 << 20:
            raise ValueError(f"classes: expected 2 to {1 << 20}, got {self.classes}")
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(
                f"class_names: expected {self.classes}, one a class, got {len(self.class_names)}"
            )
        if classes.normalized(self.class_names) != self.class_names:
            raise ValueError("class_names: expected Unicode's normal form C")
        _check_shape("input", self.input, 1, 4)
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate: expected over 0 to 1, got {self.keep_rate}")


@dataclass(frozen=True)
class Preprocess:
    """x = (byte / 255 - mean) / std, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(m) for m in self.mean):
            raise ValueError(f"mean: expected finite numbers, got {self.mean}")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"std: expected numbers over 0, got {self.std}")

    def check(self, *, channels: int) -> None:
        """Raise ValueError unless there is one mean and one std a channel."""
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"preprocess: expected a mean and a std for each of {channels} channels, got "
                f"{len(self.mean)} and {len(self.std)}"
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """The constants in the compiled update: momentum and nesterov of sgd, the rest of adam."""

    name: Literal["sgd", "adam"]
    weight_decay: float
    momentum: float | None = None
    nesterov: bool | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        own = ("momentum", "nesterov") if self.name == "sgd" else ("beta1", "beta2", "eps")
        for key in ("momentum", "nesterov", "beta1", "beta2", "eps"):
            if (getattr(self, key) is not None) != (key in own):
                raise ValueError(f"{self.name} has the settings {', '.join(own)}; see {key!r}")
        for key in ("weight_decay", "momentum", "beta1", "beta2", "eps"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{key}: expected 0 or more and less than 1, got {value}")


@dataclass(frozen=True)
class Memory:
    """What the exporter expects training to take on the device, bytes.

    Attributes:
        tensors: activations and gradients, as ONNX Runtime allocates them.
        process: the agent's whole process at its peak (VmHWM), without its images.
        recomputed: nodes that run a second time so that their results need not be kept.
    """

    tensors: int
    process: int
    recomputed: int

    def __post_init__(self) -> None:
        sizes = 0 <= self.tensors <= self.process < 1 << 62
        if not sizes or not 0 <= self.recomputed <= costs.MAX_NODES:
            raise ValueError(
                f"memory: {self.tensors} bytes of tensors in {self.process}, {self.recomputed} "
                f"nodes run again"
            )


@dataclass(frozen=True)
class Manifest:
    """What an artifact is; see the module's text for the tensors."""

    format: int
    model: ModelInfo
    task: Literal["distill", "classify"]
    batch: int
    micro_batches: int
    memory: Memory
    preprocess: Preprocess
    features: tuple[int, ...] | None
    optimizer: OptimizerSettings
    graphs: Mapping[str, Graph]
    state: tuple[TensorSpec, ...]
    producer: Mapping[str, str]
    files: Mapping[str, FileRef]

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 1 << 16:
            raise ValueError(f"batch: expected 1 to {1 << 16}, got {self.batch}")
        if not 1 <= self.micro_batches <= MAX_MICRO_BATCHES or self.batch % self.micro_batches:
            raise ValueError(
                f"micro_batches: expected a divisor of the batch of {self.batch}, at most "
                f"{MAX_MICRO_BATCHES}, got {self.micro_batches}"
            )
        _check_shape("a batch", (self.batch, *self.model.input), 2, 5)
        self.preprocess.check(channels=self.model.input[0])
        _check_names("state", self.state)
        for spec in self.state:
            if spec.role not in STATE_ROLES or spec.dtype != "float32":
                raise ValueError(f"state: {spec.name!r} is {spec.dtype} with role {spec.role!r}")
            if _RANGE.fullmatch(spec.name):
                raise ValueError(f"state: a tensor may not have the name of a range, {spec.name!r}")
            if spec.name.startswith(ANCHOR):
                begun = replace(spec, name=spec.name.removeprefix(ANCHOR), role="parameter")
                if spec.role != "optimizer" or self._known.get(begun.name) != begun:
                    raise ValueError(f"state: {spec.name!r} is no parameter's beginning")
        if self.features is not None:
            _check_shape("features", self.features, 1, 4)
        expected = {"train", "eval"} | ({"extract"} if self.features else set())
        if set(self.graphs) != expected:
            raise ValueError(f"graphs: expected {sorted(expected)}, got {sorted(self.graphs)}")
        for file in self.files:
            _check_file(file)
        named = [graph.file for graph in self.graphs.values()] + [WEIGHTS]
        if sorted(self.files) != sorted(named):
            raise ValueError(f"files: expected {sorted(named)}, got {sorted(self.files)}")
        self._check_graphs()

    def _check_graphs(self) -> None:
        batch = self.micro_batch
        x = TensorSpec("x", (batch, *self.model.input), "float32", "batch")
        logits = TensorSpec("logits", (batch, self.model.classes), "float32", "result")
        given = [
            x,
            TensorSpec("y", (batch,), "int64", "batch"),
            TensorSpec("lr", (), "float32", "setting"),
        ]
        if self.task == "distill":
            given.append(replace(logits, name="teacher", role="batch"))
            given += [TensorSpec(n, (), "float32", "setting") for n in ("alpha", "temperature")]
        if any(spec.name.startswith(ANCHOR) for spec in self.state):
            given.append(TensorSpec("mu", (), "float32", "setting"))
        if self.micro_batches > 1:
            given += [TensorSpec(n, (), "float32", "setting") for n in ("first", "last")]
        metrics = [TensorSpec(n, (), "float32", "metric") for n in ("loss", "correct")]
        train = self.graphs["train"]
        own = [s for s in train.inputs if self.place_of(s) is None or s.name.startswith("next[")]
        _expect("inputs of train", tuple(own), given)
        moved = [spec for spec in train.outputs if spec not in metrics]
        for spec in (*train.inputs, *moved):
            if _RANGE.fullmatch(spec.name) and spec.role not in STATE_ROLES:
                raise ValueError(f"train: the range {spec.name!r} has the role {spec.role!r}")
        _expect("outputs of train", train.outputs, [*metrics, *moved])
        self._check_moved(moved)
        readable = [x, *(spec for spec in self.state if spec.role != "optimizer")]
        results = {"eval": [logits]}
        if self.features is not None:
            shape = (batch, *self.features)
            results["extract"] = [TensorSpec("features", shape, "float32", "result"), logits]
        for name, outputs in results.items():
            unknown = set(self.graphs[name].inputs) - set(readable)
            if unknown or x not in self.graphs[name].inputs:
                wrong = ", ".join(sorted(repr(spec.name) for spec in unknown)) or "no 'x'"
                raise ValueError(
                    f"inputs of {name}: expected 'x', parameters and buffers; got {wrong}"
                )
            _expect(f"outputs of {name}", self.graphs[name].outputs, outputs)
            if {layer.phase for layer in self.graphs[name].layers} - {"forward"}:
                raise ValueError(f"layers of {name}: expected the phase 'forward' alone")

    def _check_moved(self, moved: list[TensorSpec]) -> None:
        """The outputs that are state: ranges of it, and no two overlap."""
        end, last = 0, ""
        ranges = [(_range("next", spec), spec) for spec in moved]
        for span, spec in sorted(ranges, key=lambda pair: pair[0] or (-1, -1)):
            if span is None or span[1] > self.values:
                raise ValueError(
                    f"outputs of train: {spec.name!r} is no range of {self.values} state values"
                )
            if span[0] < end:
                raise ValueError(f"outputs of train: {last!r} and {spec.name!r} overlap")
            end, last = span[1], spec.name

    @property
    def micro_batch(self) -> int:
        """Samples in one run of a graph."""
        return self.batch // self.micro_batches

    @cached_property
    def _known(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for spec in self.state}

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """By state tensor: where it begins in the state vector."""
        ends = itertools.accumulate(spec.size for spec in self.state)
        return {spec.name: end - spec.size for spec, end in zip(self.state, ends, strict=True)}

    @cached_property
    def values(self) -> int:
        """Length of the state vector."""
        return sum(spec.size for spec in self.state)

    def place_of(self, spec: TensorSpec) -> int | None:
        """Where in the state vector an input or an output begins; None for one that is no state."""
        if spec.name in self.offsets:
            return self.offsets[spec.name] if self._known[spec.name] == spec else None
        span = _range("state", spec) or _range("next", spec)
        return span[0] if span is not None and span[1] <= self.values else None

    @classmethod
    def parse(cls, data: bytes, *, where: str = MANIFEST) -> "Manifest":
        """Read a manifest, from disk or network.

        Raises:
            ArtifactError: anything unexpected in it; nothing is guessed.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ArtifactError(
                f"{where}: {len(data)} bytes, limit {MAX_MANIFEST_BYTES}; this is not a manifest"
            )
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as fault:
            raise ArtifactError(f"{where}: not JSON ({fault}); fetch the artifact again") from fault
        version = content.get("format") if isinstance(content, dict) else None
        if version != FORMAT or type(version) is not int:
            raise ArtifactError(
                f"{where}: expected format {FORMAT}, got {version!r:.40}; export the model again "
                f"with this version of Stillhouse, or upgrade"
            )
        manifest = records.build(cls, content, where=where, error=ArtifactError)
        if manifest.to_bytes() != data:
            raise ArtifactError(
                f"{where}: not in canonical form (sorted keys, no spaces); export the model again"
            )
        return manifest

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        content: dict[str, Any] = records.plain(self)
        if not self.model.class_names:  # as manifests were before there were names
            del content["model"]["class_names"]
        content["optimizer"] = {k: v for k, v in content["optimizer"].items() if v is not None}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode("ascii")

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest: the artifact's name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def state_of(self, *roles: Role) -> tuple[TensorSpec, ...]:
        """The state tensors with one of these roles, in order."""
        return tuple(spec for spec in self.state if spec.role in roles)


def _check_file(name: str) -> None:
    if not _FILE.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"file name: expected a plain name, got {name!r:.80}")


def _check_shape(what: str, shape: tuple[int, ...], least: int, most: int) -> None:
    if not least <= len(shape) <= most:
        raise ValueError(f"{what}: expected {least} to {most} axes, got {len(shape)}")
    if any(n < 1 for n in shape) or math.prod(shape) > MAX_VALUES:
        raise ValueError(f"{what}: shape {shape!r:.80} is empty or over {MAX_VALUES} values")


def _range(word: str, spec: TensorSpec) -> tuple[int, int] | None:
    """Start and stop of a tensor that is called, say, next[0:12] and has so many values."""
    found = _RANGE.fullmatch(spec.name)
    if found is None or found[1] != word or spec.dtype != "float32":
        return None
    start, stop = int(found[2]), int(found[3])
    return (start, stop) if stop - start == spec.size > 0 else None


def _check_names(what: str, specs: tuple[TensorSpec, ...]) -> None:
    if len(specs) > 2 * MAX_TENSORS:
        raise ValueError(f"{what}: {len(specs)} tensors, limit {2 * MAX_TENSORS}")
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError(f"{what}: two tensors have one name")


def _expect(what: str, got: tuple[TensorSpec, ...], expected: list[TensorSpec]) -> None:
    if set(got) != set(expected):
        odd = min(set(got) ^ set(expected), key=lambda spec: spec.name)
        side = "unexpected or ill-shaped" if odd in got else "missing or ill-shaped"
        raise ValueError(f"{what}: {side} {odd.name!r} {odd.dtype} {list(odd.shape)} {odd.role}")
