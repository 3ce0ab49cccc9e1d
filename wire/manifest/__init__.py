"""An artifact's manifest: its graphs with their inputs and outputs, the state, and the files.

A training step on one batch runs train.onnx once for each micro-batch. A graph's batch size B is
that of one micro-batch; loss and number of correct samples are summed over the micro-batches.

Inputs of train.onnx:

    x              float32 (B, *input)
    y              int64 (B,)
    lr             float32 ()
    teacher        float32 (B, classes); for the task `distill`, and so are
    alpha          float32 ()
    temperature    float32 ()
    first, last    float32 (); with several micro-batches: 1 in the first and in the last of them,
                   0 in the others
    mu             float32 (); weight of the proximal term, where there is one
    ...            whatever the graph reads of the state

The state is one float32 vector: the flattened state tensors, one after the other in the order of
the manifest. An input is either one state tensor, by its name, or a range of the vector, named
`state[start:stop]`; a range may lie within a tensor or across several.

Outputs: `loss` and `correct`, float32 (), and the ranges of the state that the step changes, named
`next[start:stop]`. No two ranges overlap. The tables list exactly the inputs that a graph has; an
input that a graph does not read is not there.

Roles: `batch` (x, y, teacher), `setting` (lr, alpha, temperature, first, last, mu), `metric` (loss,
correct), `result` (logits, features), and for the state `parameter`, `buffer` and `optimizer`.

The manifest comes from the network: names, sizes, shapes and types are checked before use. Its
JSON must be in canonical form (sorted keys, no spaces), so that each manifest has one digest.

    `tables`      tensors, graphs, files
    `training`    the network, its optimizer, its memory
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from wire import checks, records
from wire.errors import ArtifactError
from wire.manifest.tables import (
    MANIFEST,
    STATE_ROLES,
    FileRef,
    Graph,
    Role,
    TensorSpec,
    check_file,
    check_names,
    check_shape,
    expect,
    is_range,
    range_of,
)
from wire.manifest.training import Memory, ModelInfo, OptimizerSettings, Preprocess

__all__ = [
    "ANCHOR", "MANIFEST", "MAX_MANIFEST_BYTES", "WEIGHTS", "FileRef", "Graph", "Manifest", "Memory",
    "ModelInfo", "OptimizerSettings", "Preprocess", "Role", "TensorSpec",
]  # fmt: skip

FORMAT = 2
WEIGHTS = "init.safetensors"
MAX_MANIFEST_BYTES = 4 << 20
MAX_MICRO_BATCHES = 1024

ANCHOR = "optim.anchor."  # + a parameter's name: its value when training began


@dataclass(frozen=True)
class Manifest:
    """What an artifact is; the module's docstring describes the tensors."""

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
        checks.within("batch", self.batch, 1, 1 << 16)
        if not 1 <= self.micro_batches <= MAX_MICRO_BATCHES or self.batch % self.micro_batches:
            raise ValueError(
                f"micro_batches: expected a divisor of the batch of {self.batch}, at most "
                f"{MAX_MICRO_BATCHES}, got {self.micro_batches}"
            )
        check_shape("a batch", (self.batch, *self.model.input), 2, 5)
        self.preprocess.check(channels=self.model.input[0])
        check_names("state", self.state)
        for spec in self.state:
            if spec.role not in STATE_ROLES or spec.dtype != "float32":
                raise ValueError(f"state: {spec.name!r} is {spec.dtype} with role {spec.role!r}")
            if is_range(spec.name):
                raise ValueError(f"state: a tensor may not have the name of a range, {spec.name!r}")
            if spec.name.startswith(ANCHOR):
                parameter = replace(spec, name=spec.name.removeprefix(ANCHOR), role="parameter")
                if spec.role != "optimizer" or self._by_name.get(parameter.name) != parameter:
                    raise ValueError(f"state: {spec.name!r} is no parameter's beginning")
        if self.features is not None:
            check_shape("features", self.features, 1, 4)
        expected = {"train", "eval"} | ({"extract"} if self.features else set())
        if set(self.graphs) != expected:
            raise ValueError(f"graphs: expected {sorted(expected)}, got {sorted(self.graphs)}")
        for file in self.files:
            check_file(file)
        named = [graph.file for graph in self.graphs.values()] + [WEIGHTS]
        if sorted(self.files) != sorted(named):
            raise ValueError(f"files: expected {sorted(named)}, got {sorted(self.files)}")
        self._check_graphs()

    def _check_graphs(self) -> None:
        batch = self.micro_batch
        x = TensorSpec("x", (batch, *self.model.input), "float32", "batch")
        logits = TensorSpec("logits", (batch, self.model.classes), "float32", "result")
        inputs = [x, TensorSpec("y", (batch,), "int64", "batch"), *_scalars("setting", "lr")]
        if self.task == "distill":
            inputs.append(replace(logits, name="teacher", role="batch"))
            inputs += _scalars("setting", "alpha", "temperature")
        if any(spec.name.startswith(ANCHOR) for spec in self.state):
            inputs += _scalars("setting", "mu")
        if self.micro_batches > 1:
            inputs += _scalars("setting", "first", "last")
        metrics = _scalars("metric", "loss", "correct")
        train = self.graphs["train"]
        stateless = [
            s for s in train.inputs if self.place_of(s) is None or s.name.startswith("next[")
        ]
        expect("inputs of train", tuple(stateless), inputs)
        changed = [spec for spec in train.outputs if spec not in metrics]
        for spec in (*train.inputs, *changed):
            if is_range(spec.name) and spec.role not in STATE_ROLES:
                raise ValueError(f"train: the range {spec.name!r} has the role {spec.role!r}")
        expect("outputs of train", train.outputs, [*metrics, *changed])
        self._check_changed(changed)
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
            expect(f"outputs of {name}", self.graphs[name].outputs, outputs)
            if {layer.phase for layer in self.graphs[name].layers} - {"forward"}:
                raise ValueError(f"layers of {name}: expected the phase 'forward' alone")

    def _check_changed(self, changed: list[TensorSpec]) -> None:
        """Raise ValueError unless these outputs are ranges of the state, and no two overlap."""
        end, last = 0, ""
        ranges = [(range_of("next", spec), spec) for spec in changed]
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
    def _by_name(self) -> Mapping[str, TensorSpec]:
        return {spec.name: spec for spec in self.state}

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """Where each state tensor begins in the state vector, by its name."""
        ends = itertools.accumulate(spec.size for spec in self.state)
        return {spec.name: end - spec.size for spec, end in zip(self.state, ends, strict=True)}

    @cached_property
    def values(self) -> int:
        """Length of the state vector."""
        return sum(spec.size for spec in self.state)

    def place_of(self, spec: TensorSpec) -> int | None:
        """Where an input or output begins in the state vector; None if it is no part of it."""
        if spec.name in self.offsets:
            return self.offsets[spec.name] if self._by_name[spec.name] == spec else None
        span = range_of("state", spec) or range_of("next", spec)
        return span[0] if span is not None and span[1] <= self.values else None

    @classmethod
    def parse(cls, data: bytes, *, where: str = MANIFEST) -> "Manifest":
        """Read a manifest from disk or network.

        Raises:
            ArtifactError: the manifest holds anything unexpected; nothing is guessed.
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
        if not self.model.class_names:  # manifests that know no names have no such key
            del content["model"]["class_names"]
        content["optimizer"] = {k: v for k, v in content["optimizer"].items() if v is not None}
        return records.canonical(content)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest: the artifact's name."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def state_of(self, *roles: Role) -> tuple[TensorSpec, ...]:
        """The state tensors with one of these roles, in order."""
        return tuple(spec for spec in self.state if spec.role in roles)


def _scalars(role: Role, *names: str) -> list[TensorSpec]:
    return [TensorSpec(name, (), "float32", role) for name in names]
