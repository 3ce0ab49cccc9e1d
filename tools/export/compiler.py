"""One module's training step and evaluation as ONNX graphs, and the roles of their tensors."""

import copy
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from tools.export.graph import Graph, Value
from tools.export.lower import lower
from tools.export.optimizers import Optimizer
from tools.export.program import Program
from tools.export.step import Task, Tensors, trace_eval, trace_train
from wire.artifact import Role, TensorSpec
from wire.errors import ExportError

_DTYPES: dict[torch.dtype, Literal["float32", "int64"]] = {
    torch.float32: "float32",
    torch.int64: "int64",
}
_GIVEN: dict[str, Role] = {
    "x": "batch",
    "y": "batch",
    "lr": "setting",
    "teacher": "batch",
    "alpha": "setting",
    "temperature": "setting",
    "loss": "metric",
    "correct": "metric",
    "logits": "result",
    "features": "result",
}


class Compiler:
    """Traces and lowers one module.

    Attributes:
        state: every state tensor with its initial value: parameters, buffers, optimizer.
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
    ) -> None:
        self.module, self.tensors, self.optimizer, self.task = module, tensors, optimizer, task
        batch, scalar = shape[0], torch.ones(())
        self.batch = {
            "x": torch.zeros(shape),
            "y": torch.zeros(batch, dtype=torch.int64),
            "lr": scalar,
        }
        if task == "distill":
            teacher = torch.zeros(batch, classes)
            self.batch |= {"teacher": teacher, "alpha": scalar, "temperature": scalar}
        self.moments = optimizer.initial(tensors.trained)
        self.state = {**tensors.parameters, **tensors.buffers, **self.moments}

    def role(self, name: str) -> Role:
        """Of an input or an output."""
        if name in _GIVEN:
            return _GIVEN[name]
        name = name.removesuffix(".next")
        if name in self.moments:
            return "optimizer"
        return "parameter" if name in self.tensors.parameters else "buffer"

    def train(self) -> Program:
        """The graph of one training step."""
        traced, outputs = trace_train(
            copy.deepcopy(self.module),  # functional_call leaves traces in tied weights
            self.tensors,
            task=self.task,
            optimizer=self.optimizer,
            state=self.moments,
            batch=list(self.batch.values()),
        )
        g = Graph()
        inputs = self._inputs(g, {**self.batch, **self.state})
        results = lower(g, traced, inputs)
        fixed = dict(zip(self.tensors.fixed, inputs[-len(self.tensors.fixed) :], strict=False))
        for name, value in zip(outputs, results, strict=True):
            if name not in self.tensors.fixed:
                g.output(name, value)
            elif value != fixed[name] and not name.endswith("num_batches_tracked"):
                raise ExportError(
                    f"buffer {name!r} changes in training, but only float32 buffers in the "
                    f"state_dict can; register it as one"
                )
        return g.program("train")

    def evaluate(self, *, extract: bool) -> Program:
        """The graph of the evaluation mode: logits, or features and logits."""
        x = self.batch["x"]
        traced = trace_eval(copy.deepcopy(self.module), self.tensors, x, extract=extract)
        g = Graph()
        own = {**self.tensors.parameters, **self.tensors.buffers}
        results = lower(g, traced, self._inputs(g, {"x": x, **own}))
        for name, value in zip(["features", "logits"][-len(results) :], results, strict=True):
            g.output(name, value)
        return g.program("extract" if extract else "eval")

    def _inputs(self, g: Graph, tensors: dict[str, Tensor]) -> list[Value]:
        """Inputs for all tensors, constants for the fixed ones."""
        inputs = [g.input(key, value.shape, value.dtype) for key, value in tensors.items()]
        fixed = self.tensors.fixed.values()
        return inputs + [g.constant(value.numpy(), value.dtype) for value in fixed]

    def tables(self, program: Program) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """The table of a graph's inputs, and that of its outputs."""
        return self._table(program, program.inputs), self._table(program, program.outputs)

    def _table(self, program: Program, names: Iterable[str]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, spec.shape, _DTYPES[spec.dtype], self.role(name))
            for name, spec in ((name, program.specs[name]) for name in names)
        )
