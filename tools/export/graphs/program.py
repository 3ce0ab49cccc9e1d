"""A finished graph: what the passes rewrite, the cost table counts, and ONNX is written from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from wire.costs import Phase
from wire.operators import BY_DOMAIN, CONTRIB, STANDARD

Array = NDArray[Any]

OPSET = 18  # the newest that every onnxruntime since 1.15 runs
IR_VERSION = 9
CONTRIB_OPS = BY_DOMAIN[CONTRIB]  # beyond the standard; every onnxruntime has them
PRODUCTS = frozenset(["Conv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm"])

_ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.bool: onnx.TensorProto.BOOL,
}
_BYTES = {torch.float32: 4, torch.float64: 8, torch.int64: 8, torch.int32: 4, torch.bool: 1}


@dataclass(frozen=True)
class Spec:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Size in memory, in bytes."""
        return self.size * _BYTES[self.dtype]


@dataclass(frozen=True)
class Place:
    """The origin of a node: a layer of the module, and a phase of the step."""

    layer: str = ""
    phase: Phase = "forward"


@dataclass(frozen=True)
class Node:
    """One operator; an optional input or output that is left out is ""."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]
    place: Place = Place()

    def attribute(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or the default."""
        return dict(self.attributes).get(name, default)


@dataclass(frozen=True)
class Program:
    """Nodes in the order of execution.

    Attributes:
        nodes: each after the nodes whose outputs it reads.
        specs: shape and type of every value by name, constants and inputs included.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        constants: their values by name.
    """

    name: str
    nodes: tuple[Node, ...]
    specs: Mapping[str, Spec]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]

    def with_nodes(
        self, nodes: Sequence[Node], specs: Mapping[str, Spec] | None = None
    ) -> "Program":
        """The same program with other nodes; those that no output needs are dropped."""
        needed = set(self.outputs)
        live: list[Node] = []
        for node in reversed(nodes):
            if needed.intersection(node.outputs):
                last = max(i for i, output in enumerate(node.outputs) if output in needed)
                live.append(replace(node, outputs=node.outputs[: last + 1]))
                needed.update(node.inputs)
        return replace(
            self,
            nodes=tuple(reversed(live)),
            specs=self.specs if specs is None else specs,
            inputs=tuple(name for name in self.inputs if name in needed),
            constants={name: array for name, array in self.constants.items() if name in needed},
        )

    def readers(self) -> dict[str, list[int]]:
        """The indices in `nodes` of the readers of each value."""
        by_value: dict[str, list[int]] = {}
        for number, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.inputs):
                by_value.setdefault(name, []).append(number)
        return by_value

    def model(self) -> onnx.ModelProto:
        """The checked ONNX model; operators beyond the standard are in ONNX Runtime's domain."""
        graph = helper.make_graph(
            [_proto(number, node) for number, node in enumerate(self.nodes)],
            self.name,
            [self._info(name) for name in self.inputs],
            [self._info(name) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        if unknown := {node.op for node in self.nodes} - STANDARD - CONTRIB_OPS:
            raise AssertionError(f"devices refuse {sorted(unknown)}: add it to wire.operators")
        domains = {_domain(node) for node in self.nodes} | {""}
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(d, 1 if d else OPSET) for d in sorted(domains)],
            ir_version=IR_VERSION,
            producer_name="stillhouse",
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def _info(self, name: str) -> onnx.ValueInfoProto:
        spec = self.specs[name]
        return helper.make_tensor_value_info(name, _ONNX_TYPES[spec.dtype], list(spec.shape))


def _proto(number: int, node: Node) -> onnx.NodeProto:
    attributes = {key: list(v) if isinstance(v, tuple) else v for key, v in node.attributes}
    return helper.make_node(
        node.op, node.inputs, node.outputs, name=f"n{number}", domain=_domain(node), **attributes
    )


def _domain(node: Node) -> str:
    return CONTRIB if node.op in CONTRIB_OPS else ""


def onnx_type(dtype: torch.dtype) -> int:
    """ONNX's number for a torch type."""
    return int(_ONNX_TYPES[dtype])
