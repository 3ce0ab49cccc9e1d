"""From a traced list of ATen operators to an ONNX graph, one rule an operator."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tools.export.graph import Graph, Spec, Value
from tools.export.rules import RULES
from tools.export.rules.registry import Unsupported
from tools.export.trace import module_of
from wire.errors import ExportError

aten: Any = torch.ops.aten

_REMEDIES = {
    "dropout": "a compiled step has no random numbers; leave dropout out, or set p=0",
    "bernoulli": "a compiled step has no random numbers; leave the noise out",
    "rand": "a compiled step has no random numbers; leave the noise out",
    "adaptive_max_pool": "use MaxPool2d with a fixed kernel",
    "upsample": "use nearest-neighbour upsampling by a whole factor",
    "index": "use slices, or a product with a one-hot matrix",
    "scatter": "use slices and concat",
    "_local_scalar_dense": "the shapes and the flow of a compiled step are fixed; avoid .item()",
}


def lower(g: Graph, traced: fx.GraphModule, inputs: Sequence[Value]) -> list[Value]:
    """Add the traced operators to the graph.

    Args:
        g: where the nodes go.
        traced: from `trace`.
        inputs: the values of the function's arguments, in order.

    Raises:
        ExportError: an operator without a rule; the message names it, its module and a remedy.
    """
    values: dict[fx.Node, Any] = {}
    waiting = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(waiting)
        elif node.op == "get_attr":
            tensor = getattr(traced, str(node.target))
            values[node] = g.constant(tensor.detach().numpy(), tensor.dtype)
        elif node.op == "output":
            return [values[result] for result in node.args[0]]
        elif node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = _apply(g, node, values)
    raise AssertionError("a traced graph ends with its output")


def _apply(g: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    name = str(node.target).removesuffix(".default")
    rule = RULES.get(node.target)  # type: ignore[call-overload]
    if rule is None:
        raise ExportError(f"{name} in {module_of(node)} cannot be compiled; {_remedy(name)}")
    arguments = fx.node.map_arg(node.args, values.__getitem__)
    settings = fx.node.map_arg(node.kwargs, values.__getitem__)
    try:
        result = rule(g, _spec(node), *arguments, **settings)
    except Unsupported as fault:
        raise ExportError(f"{name} in {module_of(node)} cannot be compiled: {fault}") from fault
    except KeyError as fault:
        raise ExportError(
            f"{name} in {module_of(node)} makes {fault.args[0]} tensors; a compiled step has "
            f"float32, float64, int32, int64 and bool"
        ) from fault
    if node.target is aten.native_batch_norm.default:
        for place, new in zip((3, 4), result[3:], strict=True):
            if isinstance(node.args[place], fx.Node):
                values[node.args[place]] = new
    return result


def _spec(node: fx.Node) -> Any:
    result = node.meta["val"]
    if isinstance(result, torch.Tensor):
        return Spec(tuple(result.shape), result.dtype)
    return tuple(
        Spec(tuple(part.shape), part.dtype) if isinstance(part, torch.Tensor) else None
        for part in result
    )


def _remedy(name: str) -> str:
    for word, remedy in _REMEDIES.items():
        if word in name:
            return remedy
    return "write it with other operators, or add a rule for it to tools/export/rules"
