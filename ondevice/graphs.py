"""What a graph holds, looked at before ONNX Runtime sees it: a graph may come from the network.

A closed list of operators (`wire.operators`), no control flow, no functions, no text, and no tensor
in another file: ONNX Runtime would follow a path out of the artifact's folder.

Only the parts of ONNX's protobuf format that matter here are declared. Parsing skips all others.
"""

from functools import cache
from typing import Any

from wire import operators
from wire.errors import ArtifactError

MAX_NODES = 200_000
_EXTERNAL, _STRING, _GRAPH = 1, 8, {5, 10}  # TensorProto.EXTERNAL, .STRING; AttributeProto.GRAPH(S)
# Message -> field -> (number, type or message, whether it is repeated), of onnx.proto.
_FIELDS: dict[str, dict[str, tuple[int, str, bool]]] = {
    "Tensor": {
        "data_type": (2, "int32", False),
        "external_data": (13, "bytes", True),
        "data_location": (14, "int32", False),
    },
    "Attribute": {
        "type": (20, "int32", False),
        "i": (3, "int64", False),
        "t": (5, "Tensor", False),
        "tensors": (10, "Tensor", True),
        "g": (6, "bytes", False),
        "graphs": (11, "bytes", True),
        "sparse_tensor": (22, "bytes", False),
        "sparse_tensors": (23, "bytes", True),
    },
    "Node": {
        "op_type": (4, "string", False),
        "domain": (7, "string", False),
        "attribute": (5, "Attribute", True),
    },
    "Graph": {
        "node": (1, "Node", True),
        "initializer": (5, "Tensor", True),
        "sparse_initializer": (15, "bytes", True),
    },
    "Model": {
        "graph": (7, "Graph", False),
        "training_info": (20, "bytes", True),
        "functions": (25, "bytes", True),
    },
}


def check(content: bytes, where: str) -> None:
    """Check a graph's file.

    Raises:
        ArtifactError: it is no ONNX model, or holds what no artifact of ours does.
    """
    from google.protobuf.message import DecodeError  # a requirement of onnxruntime

    try:
        model = _model()()
        model.ParseFromString(content)
    except DecodeError as fault:
        raise ArtifactError(f"{where}: expected an ONNX graph: {fault}") from fault
    if found := _odd(model):
        raise ArtifactError(f"{where}: it has {found}, as no artifact of ours; it is not run")


def _odd(model: Any) -> str:
    """What does not belong into a graph, in words; "" if all does."""
    graph = model.graph
    if model.functions or model.training_info or graph.sparse_initializer:
        return "functions, further graphs or sparse tensors"
    if not 0 < len(graph.node) <= MAX_NODES:
        return f"{len(graph.node)} nodes"
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type not in operators.BY_DOMAIN.get(node.domain, ()):
            return f"an operator {node.op_type!r:.60} of domain {node.domain!r:.60}"
        for attribute in node.attribute:
            inner = attribute.g or attribute.graphs or attribute.type in _GRAPH
            if inner or attribute.sparse_tensor or attribute.sparse_tensors:
                return f"a graph or a sparse tensor within a node ({node.op_type})"
            if node.op_type == "Cast" and attribute.i == _STRING:
                return "text"
            tensors += [attribute.t, *attribute.tensors]
    if any(tensor.data_location == _EXTERNAL or tensor.external_data for tensor in tensors):
        return "a tensor in another file"
    if any(tensor.data_type == _STRING for tensor in tensors):
        return "text"
    return ""


@cache
def _model() -> Any:
    """The class of `Model`, made from `_FIELDS`."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="stillhouse/graph.proto", package="stillhouse", syntax="proto2"
    )
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for key, (number, kind, repeated) in fields.items():
            field = message.field.add(name=key, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            if kind in _FIELDS:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".stillhouse.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("stillhouse.Model"))
