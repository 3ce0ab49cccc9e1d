"""The traces of the two parts of a network that is cut behind one of its modules.

torch.fx traces the forward passes of the modules that contain the cut; all other modules are called
as they are, whatever they do inside. Numbers that follow from the shape of an image become
constants; the size of the batch is read from the feature map.
"""

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.submodel import FORWARD_FAULTS, first_line

_INNER = "inner."


class NoCutError(Exception):
    """Why a network cannot be cut at a place."""


def traced(model: nn.Module, path: str, shape: tuple[int, ...]) -> tuple[fx.Graph, fx.Graph]:
    """The graph up to the module at `path`, and the rest as a function of its output.

    Args:
        model: takes (N, *shape); it is traced in the mode that it is in.
        path: as `named_modules` has it.
        shape: one sample's.

    Raises:
        NoCutError: the rest needs more than the module's output, or there is no such trace.
    """
    whole = _Whole(model)
    try:
        graph = _Tracer(_INNER + path, shape).trace(whole)
    except (*FORWARD_FAULTS, fx.proxy.TraceError) as fault:
        parent = path.rpartition(".")[0]
        raise NoCutError(
            f"the forward pass of {'the network' if not parent else repr(parent)}, or one "
            f"around it, cannot be followed by torch.fx: {first_line(fault)}"
        ) from fault
    return _halves(graph, whole, _INNER + path, shape)


class _Whole(nn.Module):
    """Calls the network with one argument, so that all others take their defaults."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class _Tracer(fx.Tracer):
    """Traces only into the modules that contain a path, and follows branches on image shapes."""

    def __init__(self, path: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._path, self._shape = path, shape
        self._running = False

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The condition of a branch, if it is the same for batches of two and of three."""
        self._running = True
        try:
            values = [_values(self.root, self.graph, (n, *self._shape)) for n in (2, 3)]
        finally:
            self._running = False
        two, three = (by_node[obj.node] for by_node in values)
        return two if isinstance(two, bool) and two == three else super().to_bool(obj)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A call in the trace; within `to_bool`, the module runs instead."""
        return (
            forward(*args, **kwargs)
            if self._running
            else super().call_module(m, forward, args, kwargs)
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A tensor in the trace; within `to_bool`, the tensor itself."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m
        return not self._path.startswith(f"{module_qualified_name}.")


class _Shape(tuple[int, ...]):
    """The shape of a tensor."""

    __slots__ = ()


class _Values(fx.Interpreter):
    """Runs a graph and keeps the value of each node; of a tensor, only its shape."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.by_node: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.by_node[n] = _Shape(value.shape) if isinstance(value, Tensor) else value
        return value


def _halves(
    graph: fx.Graph, whole: nn.Module, path: str, shape: tuple[int, ...]
) -> tuple[fx.Graph, fx.Graph]:
    cut = _only_call(graph, whole, path)
    output = next(node for node in graph.nodes if node.op == "output")
    if cut not in _reached(output):
        raise NoCutError("the logits do not depend on it")
    values = [_values(whole, graph, (size, *shape)) for size in (2, 3)]
    _check_feature_map(values[0][cut])
    numbers = {node for node, value in values[0].items() if _is_number(value)}
    before, after = _reached(cut), _reached(output, frozenset({cut, *numbers}))
    past = (before & after) - numbers - {cut}
    for node in graph.nodes:
        if node in past and any(user in after and user not in before for user in node.users):
            raise NoCutError(f"{_described(node)} goes past it")
    first, rest = fx.Graph(), fx.Graph()
    firsts: dict[fx.Node, Any] = {}  # the copies of the trace's nodes in each part
    rests: dict[fx.Node, Any] = {cut: rest.placeholder("h")}
    batch = rest.call_method("size", (rests[cut], 0)) if numbers & after else None
    for node in graph.nodes:
        if node in before:
            firsts[node] = _copy(first, node, firsts.__getitem__)
        if node in after & numbers:
            rests[node] = _number(rest, node, [v[node] for v in values], rests[cut], batch)
        elif node in after and node is not cut:
            rests[node] = _copy(rest, node, rests.__getitem__)
    first.output(firsts[cut])
    return first, rest


def _only_call(graph: fx.Graph, whole: nn.Module, path: str) -> fx.Node:
    """The one call of the module at `path`."""
    module = whole.get_submodule(path)
    calls: list[fx.Node] = [
        node for node in graph.nodes
        if node.op == "call_module" and whole.get_submodule(str(node.target)) is module
    ]  # fmt: skip
    if len(calls) != 1:
        often = f"{len(calls)} times" if calls else "nowhere"
        raise NoCutError(f"it is called {often} in the forward pass, expected once")
    return calls[0]


def _check_feature_map(value: object) -> None:
    """Refuse the output of a module, given two samples, unless it is a feature map of each."""
    if not isinstance(value, _Shape) or len(value) != 4 or value[0] != 2:
        what = tuple(value) if isinstance(value, _Shape) else type(value).__name__
        raise NoCutError(f"its output is {what}, expected a feature map (N, C, H, W)")


def _reached(node: fx.Node, ends: frozenset[fx.Node] = frozenset()) -> set[fx.Node]:
    """A node and all nodes that it depends on, but not those that only `ends` depend on."""
    reached, waiting = {node}, [node]
    while waiting:
        last = waiting.pop()
        new = set() if last in ends else set(last.all_input_nodes) - reached
        reached |= new
        waiting += new
    return reached


def _is_number(value: object) -> bool:
    """Whether a node's value is no tensor, but follows from the shape of an image."""
    if isinstance(value, tuple) and not isinstance(value, _Shape):
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float | str | torch.dtype | torch.device | None)


def _values(whole: nn.Module, graph: fx.Graph, shape: tuple[int, ...]) -> dict[fx.Node, Any]:
    watched = _Values(copy.deepcopy(whole), graph)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        watched.run(torch.zeros(shape))
    return watched.by_node


def _copy(graph: fx.Graph, node: fx.Node, copies: Callable[[fx.Node], Any]) -> fx.Node:
    """A node's copy in another graph, where modules and tensors have their own names again."""
    copied = graph.node_copy(node, copies)
    if node.op in ("call_module", "get_attr"):
        copied.target = str(node.target).removeprefix(_INNER)
    return copied


def _number(
    graph: fx.Graph, node: fx.Node, values: list[Any], h: fx.Node, size: fx.Node | None
) -> Any:
    """The rest's own node for a number, or a tuple of numbers, of the first part.

    Args:
        graph: the rest.
        node: computes the number in the first part.
        values: the number, for batches of two and of three.
        h: the feature map.
        size: the number of samples in it.

    Raises:
        NoCutError: it is not a multiple of the batch size plus a constant.
    """
    two, three = values
    if isinstance(two, torch.dtype | torch.device):
        return graph.call_function(getattr, (h, "dtype" if isinstance(two, torch.dtype) else
                                             "device"))  # fmt: skip
    if isinstance(two, tuple) and isinstance(three, tuple) and len(two) == len(three):
        return tuple(_number(graph, node, [a, b], h, size) for a, b in zip(two, three, strict=True))
    if two == three and isinstance(two, bool | int | float | str | None):
        return two
    if isinstance(two, int) and isinstance(three, int):
        by, more = three - two, two - 2 * (three - two)
        scaled = graph.call_function(operator.mul, (size, by)) if by != 1 else size
        return graph.call_function(operator.add, (scaled, more)) if more else scaled
    raise NoCutError(f"{_described(node)} goes past it")


def _described(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the image itself"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    if node.op == "get_attr":
        return f"parameter {str(target).removeprefix(_INNER)!r}"
    what = "module" if node.op == "call_module" else "operation"
    return f"the output of {what} {str(target).removeprefix(_INNER)!r}"
