"""From a function of tensors to an ONNX graph: a trace of ATen operators, then a rule for each.

`make_fx` runs the function on tensors without data and records every operator, those of the
backward pass included. `functionalize` turns writes in place (ReLU(inplace=True), counters) into
new values. PyTorch's decompositions reduce operators without a rule of ours to its core set.

One write in place remains: batch norm's update of the running statistics, hidden in its kernel.
`lower` gives the changed buffers their new values.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._ops import OpOverload
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from models.submodel import first_line
from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.remedies import remedy
from tools.export.rules import RULES
from tools.export.rules.registry import Unsupported
from tools.export.tracing.provenance import describe, place_of, place_of_products, recorded
from wire.errors import ExportError

aten: Any = torch.ops.aten


def trace(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], module: nn.Module
) -> fx.GraphModule:
    """The trace of the operators that `function` runs on `inputs`.

    Args:
        function: it calls `module`.
        inputs: its arguments.
        module: its submodules are the layers that the operators are attributed to.

    Raises:
        ExportError: the function's flow depends on its data.
    """
    decompositions = [*core_aten_decompositions().items(), *_written_in_place()]  # type: ignore[no-untyped-call]
    table = {op: how for op, how in decompositions if op not in RULES}

    def observed(*tensors: Tensor) -> list[Tensor]:
        with recorded(module):
            return function(*tensors)

    try:
        graph = make_fx(
            functionalize(observed, remove="mutations_and_views"),
            decomposition_table=table,
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*(tensor.detach().clone() for tensor in inputs))
    except RuntimeError as fault:
        raise ExportError(
            f"the model cannot be traced ({first_line(fault)}); a compiled step "
            f"has fixed shapes and a fixed flow: no branch, loop or .item() that depends on data"
        ) from fault
    graph.graph.eliminate_dead_code()
    return graph


@functools.cache
def _written_in_place() -> list[tuple[OpOverload, Callable[..., Tensor]]]:
    """For each ATen operator that writes in place: a decomposition into the pure one and a copy.

    `functionalize` removes the model's writes in place, but PyTorch's decompositions (of RMSNorm,
    cosine similarity, GRU) have more, into tensors that they make. The tracer points every later
    reader of the tensor to the copy.
    """
    decompositions: list[tuple[OpOverload, Callable[..., Tensor]]] = []
    for name in dir(aten):
        if not name.endswith("_") or name.endswith("__") or name == "copy_":
            continue
        packet, pure = getattr(aten, name), getattr(aten, name[:-1], None)
        for overload in set(packet.overloads()) & set(pure.overloads() if pure else ()):
            how = functools.partial(_then_copied, getattr(pure, overload))
            decompositions.append((getattr(packet, overload), how))
    return decompositions


def _then_copied(pure: OpOverload, target: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    return target.copy_(pure(target, *arguments, **settings))


def lower(g: Graph, traced: fx.GraphModule, inputs: Sequence[Value]) -> list[Value]:
    """Add the traced operators to the graph.

    Args:
        g: the graph that gets the nodes.
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
    place = place_of(node)
    where = f"{name} in {describe(place)}"
    rule = RULES.get(node.target)  # type: ignore[call-overload]
    if rule is None:
        raise ExportError(f"{where} cannot be compiled; {remedy(name)}")
    g.place, g.place_of_products = place, place_of_products(node)
    arguments = fx.node.map_arg(node.args, values.__getitem__)
    settings = fx.node.map_arg(node.kwargs, values.__getitem__)
    try:
        result = rule(g, _spec(node), *arguments, **settings)
    except Unsupported as fault:
        raise ExportError(f"{where} cannot be compiled: {fault}") from fault
    except KeyError as fault:
        raise ExportError(
            f"{where} makes {fault.args[0]} tensors; a compiled step has "
            f"float32, float64, int32, int64 and bool"
        ) from fault
    if node.target is aten.native_batch_norm.default:
        changed = zip(node.args[3:5], result[3:], strict=True)
        values |= {buffer: new for buffer, new in changed if isinstance(buffer, fx.Node)}
    return result


def _spec(node: fx.Node) -> Any:
    result = node.meta["val"]
    if isinstance(result, torch.Tensor):
        return Spec(tuple(result.shape), result.dtype)
    return tuple(
        Spec(tuple(part.shape), part.dtype) if isinstance(part, torch.Tensor) else None
        for part in result
    )
