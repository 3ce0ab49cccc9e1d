"""One module's training step and evaluation as ONNX graphs, and the roles of their tensors."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import nn

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Place, Program
from tools.export.graphs.value import Value
from tools.export.lower import lower
from tools.export.rules.layers.normalization import Blend
from tools.export.rules.layout import concat
from tools.export.tracing.optimizers import STEP, Optimizer
from tools.export.tracing.provenance import settled
from tools.export.tracing.state import Piece, Tensors, offsets, pieces, span
from tools.export.tracing.step import Extras, Task, trace_eval, trace_train
from wire.errors import ExportError
from wire.manifest import Role, TensorSpec

_DTYPES: dict[torch.dtype, Literal["float32", "int64"]] = {
    torch.float32: "float32",
    torch.int64: "int64",
}
_ROLES: dict[str, Role] = {
    "x": "batch",
    "y": "batch",
    "lr": "setting",
    "teacher": "batch",
    "alpha": "setting",
    "temperature": "setting",
    "first": "setting",
    "last": "setting",
    "mu": "setting",
    "loss": "metric",
    "correct": "metric",
    "logits": "result",
    "features": "result",
}


class Compiler:
    """Traces and lowers one module.

    Attributes:
        state: every state tensor with its initial value: trained parameters, other parameters,
            buffers, tensors of the optimizer.
        batch: the inputs of a micro-batch, as zeros of their shapes.
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Tensors,
        *,
        optimizer: Optimizer,
        task: Task,
        shape: tuple[int, ...],
        classes: int,
        extras: Extras,
    ) -> None:
        self.module, self.tensors, self.optimizer, self.task = module, tensors, optimizer, task
        self.extras = extras
        samples, scalar = shape[0] // extras.micro_batches, torch.ones(())
        self.batch = {
            "x": torch.zeros(samples, *shape[1:]),
            "y": torch.zeros(samples, dtype=torch.int64),
        }
        self.settings = {"lr": scalar}
        if task == "distill":
            self.batch |= {"teacher": torch.zeros(samples, classes)}
            self.settings |= {"alpha": scalar, "temperature": scalar}
        if extras.micro_batches > 1:
            self.settings |= {"first": scalar, "last": scalar}
        if extras.proximal:
            self.settings |= {"mu": scalar}
        self.optimizer_state = extras.initial(optimizer, tensors.trained)
        parameters = {**tensors.trained, **tensors.parameters}
        self.state = {**parameters, **tensors.buffers, **self.optimizer_state}
        self._offsets = offsets({name: value.numel() for name, value in self.state.items()})

    def train(self) -> Program:
        """The graph of one training step, or of one micro-batch's part of it.

        Raises:
            ExportError: an operator has no rule, or a buffer changes that is not in the state.
        """
        cut = pieces(self.tensors)
        traced, names = trace_train(
            copy.deepcopy(self.module),  # functional_call leaves traces in tied weights
            self.tensors,
            optimizer=self.optimizer,
            pieces=cut,
            batch=self.batch,
            settings=self.settings,
            extras=self.extras,
        )
        places = self._places(cut)
        g = Graph()
        tensors = {**self.batch, **self.settings, **self.tensors.parameters, **self.tensors.buffers}
        inputs = {key: g.input(key, value.shape, value.dtype) for key, value in tensors.items()}
        inputs |= {
            key: g.input(span("state", start, size), () if key == STEP else (size,))
            for key, (start, size) in places.items()
        }
        fixed = {key: g.constant(v.numpy(), v.dtype) for key, v in self.tensors.fixed.items()}
        results = dict(
            zip(names, lower(g, traced, [*inputs.values(), *fixed.values()]), strict=True)
        )
        for name in ("loss", "correct"):
            g.output(name, results[name])
        for key, (start, size) in places.items():
            if key in results:
                g.output(span("next", start, size), results[key])
        self._buffers(g, {name: (inputs[name], results[name]) for name in self.tensors.buffers})
        for name, value in fixed.items():
            if results[name] != value and not name.endswith("num_batches_tracked"):
                raise ExportError(
                    f"buffer {name!r} changes in training, but only float32 buffers in the "
                    f"state_dict can; register it as one"
                )
        return settled(g.program("train"))

    def _places(self, cut: Sequence[Piece]) -> dict[str, tuple[int, int]]:
        """Start and size, in the state vector, of each piece of parameters and optimizer state."""
        places = {piece.key: (piece.start, piece.size) for piece in cut}
        first = next(iter(self.tensors.trained))
        keys = {piece.key: torch.zeros(1) for piece in cut}
        for key in self.extras.initial(self.optimizer, keys):
            if key == STEP:
                places[key] = (self._offsets[key], 1)
                continue
            piece = next(piece for piece in cut if key.endswith(f".{piece.key}"))
            block = self._offsets[key.removesuffix(piece.key) + first]
            places[key] = (block + piece.start, piece.size)
        return places

    def _buffers(self, g: Graph, buffers: Mapping[str, tuple[Value, Value]]) -> None:
        """Outputs for the buffers that change; neighbouring running statistics are one vector."""
        g.place = Place("", "update")
        run: list[tuple[Blend, ...]] = []
        start = 0
        for name, (old, new) in buffers.items():
            chain = _blends(g, old, new)
            if run and len(chain) != len(run[-1]):
                _blend_all(g, start, run)
                run = []
            if chain:
                start = start if run else self._offsets[name]
                run.append(chain)
            elif new != old:
                flat = new.reshape((old.size,))
                g.output(span("next", self._offsets[name], old.size), flat)
        if run:
            _blend_all(g, start, run)

    def evaluate(self, *, extract: bool) -> Program:
        """The graph of the evaluation mode: logits, or features and logits."""
        x = self.batch["x"]
        traced = trace_eval(copy.deepcopy(self.module), self.tensors, x, extract=extract)
        g = Graph()
        tensors = {"x": x, **self.tensors.parameters, **self.tensors.buffers}
        inputs = [g.input(key, value.shape, value.dtype) for key, value in tensors.items()]
        fixed = self.tensors.fixed.values()
        inputs += [g.constant(value.numpy(), value.dtype) for value in fixed]
        results = lower(g, traced, inputs)
        for name, value in zip(["features", "logits"][-len(results) :], results, strict=True):
            g.output(name, value)
        return g.program("extract" if extract else "eval")

    def role(self, name: str) -> Role:
        """The role of an input, output or state tensor; a range has the role of its beginning."""
        if name in _ROLES:
            return _ROLES[name]
        if name not in self._offsets:
            start = int(name.partition("[")[2].partition(":")[0])
            name = [key for key, offset in self._offsets.items() if offset <= start][-1]
        if name in self.optimizer_state:
            return "optimizer"
        return "parameter" if name in self.tensors.parameters else "buffer"

    def tables(self, program: Program) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The table of a graph's inputs, and that of its outputs."""
        return self._table(program, program.inputs), self._table(program, program.outputs)

    def _table(self, program: Program, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, spec.shape, _DTYPES[spec.dtype], self.role(name))
            for name, spec in ((name, program.specs[name]) for name in names)
        )


def _blends(g: Graph, old: Value, new: Value) -> tuple[Blend, ...]:
    """The running averages that lead from a buffer to its new value, if nothing else does."""
    chain: list[Blend] = []
    while new != old:
        blend = g.noted(new, Blend)
        if blend is None:
            return ()
        chain.insert(0, blend)
        new = blend.old
    return tuple(chain)


def _blend_all(g: Graph, start: int, run: Sequence[tuple[Blend, ...]]) -> None:
    """Update neighbouring buffers, each by equally many running averages, as one vector."""
    sizes = [chain[0].old.size for chain in run]
    size = sum(sizes)
    moved = g.input(span("state", start, size), (size,))
    for blends in zip(*run, strict=True):
        new = concat([blend.new.reshape((blend.old.size,)) for blend in blends], 0)
        keep = g.constant(np.repeat([blend.keep for blend in blends], sizes))
        take = g.constant(np.repeat([blend.take for blend in blends], sizes))
        moved = moved * keep + new * take
    g.output(span("next", start, size), moved)
