"""An ONNX graph under construction: values with static shapes, no duplicate work, no dead nodes.

Every value is named by its place (v0, v1, ...), so that the same calls give the same bytes. A node
that repeats an earlier one (same operator, inputs and attributes) is that earlier one; constants
are shared by content. Nodes that no output needs are dropped in the end.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

OPSET = 18  # the newest that every onnxruntime since 1.15 runs
IR_VERSION = 9

_ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
}
_NUMPY_TYPES = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.bool: np.bool_,
}


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Value(Spec):
    """A tensor in the graph."""

    name: str = ""


@dataclass(frozen=True)
class _Node:
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]


class Graph:
    """Nodes in the order of execution, with the inputs and outputs named by the caller."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._known: dict[tuple[Any, ...], tuple[Value, ...]] = {}
        self._constants: dict[str, onnx.TensorProto] = {}
        self._constant_names: dict[tuple[Any, ...], Value] = {}
        self._inputs: dict[str, Value] = {}
        self._outputs: dict[str, Value] = {}
        self._small: dict[str, Value] = {}
        self._count = 0

    def input(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Value:
        """Declare an input; it is dropped again if nothing reads it."""
        value = Value(tuple(shape), dtype, name)
        self._inputs[name] = value
        return value

    def output(self, name: str, value: Value) -> None:
        """Declare an output."""
        self._outputs[name] = value

    def constant(self, value: Any, dtype: torch.dtype = torch.float32) -> Value:
        """A constant tensor of anything numpy can make an array of."""
        array: Array = np.array(value, dtype=_NUMPY_TYPES[dtype], order="C")
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constant_names:
            name = f"c{len(self._constants)}"
            self._constants[name] = numpy_helper.from_array(array, name)
            self._constant_names[key] = Value(array.shape, dtype, name)
        return self._constant_names[key]

    def ints(self, values: Sequence[int]) -> Value:
        """A constant vector of int64: axes, shapes, pads."""
        return self.constant(list(values), torch.int64)

    def node(
        self,
        op: str,
        *inputs: Value | None,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        **attributes: Any,
    ) -> Value:
        """One node with one output of the given shape and type."""
        return self.nodes(op, *inputs, outputs=[Spec(tuple(shape), dtype)], **attributes)[0]

    def nodes(
        self, op: str, *inputs: Value | None, outputs: Sequence[Spec], **attributes: Any
    ) -> tuple[Value, ...]:
        """One node with several outputs."""
        names = tuple("" if value is None else value.name for value in inputs)
        pairs = tuple(
            (key, tuple(value) if isinstance(value, list) else value)
            for key, value in sorted(attributes.items())
        )
        key = (op, names, pairs, tuple((spec.shape, spec.dtype) for spec in outputs))
        if key not in self._known:
            results = []
            for spec in outputs:
                results.append(Value(spec.shape, spec.dtype, f"v{self._count}"))
                self._count += 1
            self._nodes.append(_Node(op, names, tuple(v.name for v in results), pairs))
            self._known[key] = tuple(results)
        return self._known[key]

    def expand(self, value: Value, shape: Sequence[int]) -> Value:
        """Broadcast to a shape; `small` finds the value again."""
        if tuple(shape) == value.shape:
            return value
        wide = self.node("Expand", value, self.ints(shape), shape=shape, dtype=value.dtype)
        self._small[wide.name] = self.small(value)
        return wide

    def small(self, value: Value) -> Value:
        """What the value was before it was expanded: enough for an operator that broadcasts."""
        return self._small.get(value.name, value)

    def build(self, name: str) -> onnx.ModelProto:
        """The checked model, with the live nodes, constants and inputs only."""
        rename, copies = self._name_outputs()
        needed = {value.name for value in self._outputs.values()}
        live: list[_Node] = []
        for node in reversed(self._nodes):
            if needed.intersection(node.outputs):
                live.append(node)
                needed.update(node.inputs)
        protos = [
            helper.make_node(
                node.op,
                [rename.get(i, i) for i in node.inputs],
                [rename.get(o, o) for o in _wanted(node.outputs, needed)],
                name=f"n{number}",
                **{key: list(v) if isinstance(v, tuple) else v for key, v in node.attributes},
            )
            for number, node in enumerate(reversed(live))
        ]
        protos += [helper.make_node("Identity", [source], [to]) for source, to in copies]
        graph = helper.make_graph(
            protos,
            name,
            [_info(key, v) for key, v in self._inputs.items() if key in needed],
            [_info(key, v) for key, v in self._outputs.items()],
            [proto for key, proto in self._constants.items() if key in needed],
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="stillhouse",
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _name_outputs(self) -> tuple[Mapping[str, str], list[tuple[str, str]]]:
        """Give computed outputs their names in place; copy inputs, constants and repeats."""
        rename: dict[str, str] = {}
        copies: list[tuple[str, str]] = []
        for name, value in self._outputs.items():
            if value.name in self._inputs or value.name in self._constants:
                copies.append((value.name, name))
            elif value.name in rename:
                copies.append((rename[value.name], name))
            else:
                rename[value.name] = name
        return rename, copies


def _info(name: str, value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _ONNX_TYPES[value.dtype], list(value.shape))


def _wanted(outputs: tuple[str, ...], needed: set[str]) -> tuple[str, ...]:
    """The outputs up to the last that is needed: those at the end are optional."""
    last = max(place for place, name in enumerate(outputs) if name in needed)
    return outputs[: last + 1]


def onnx_type(dtype: torch.dtype) -> int:
    """The number ONNX gives to a torch type."""
    return int(_ONNX_TYPES[dtype])


def count_flops(model: onnx.ModelProto) -> int:
    """2 x multiply-accumulates of the Conv, ConvTranspose, MatMul and Gemm nodes, in one run."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {
        info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in [*inferred.input, *inferred.value_info, *inferred.output]
    }
    shapes |= {constant.name: list(constant.dims) for constant in inferred.initializer}
    return sum(_flops(node, shapes) for node in inferred.node)


def _flops(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type not in {"Conv", "ConvTranspose", "MatMul", "Gemm"}:
        return 0
    left, right = shapes[node.input[0]], shapes[node.input[1]]
    out = shapes[node.output[0]]
    if node.op_type == "Conv":  # weight (outputs, inputs / groups, *kernel)
        return 2 * math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":  # weight (inputs, outputs / groups, *kernel)
        return 2 * math.prod(left) * math.prod(right[1:])
    if node.op_type == "MatMul":
        return 2 * math.prod(out) * left[-1]
    flipped = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(out) * left[0 if flipped else 1]
