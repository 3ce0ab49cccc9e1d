"""Cut a network in two behind one of its modules: FedGKT's W_e and W_c of any chain.

    x -> extractor -> H (N, C, H, W) -> rest -> logits

torch.fx traces the forward passes that lie around the module, in training and in evaluation mode;
all other modules are called as they are, whatever they do inside. The cut is one where all that
follows depends on the module's output alone. Numbers that follow from the shape of an image are
constants, but for the size of the batch, which is that of H.
"""

import copy
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.submodel import FORWARD_FAULTS, run
from wire.errors import StillhouseError

_INNER = "inner."
_LISTED = 12  # paths that a message names


@dataclass(frozen=True)
class Cut:
    """Where a network is cut: its two parts, each in training mode (True) and in evaluation mode.

    `copies`: the rest would write into the feature map, so it gets a copy.
    """

    path: str
    extractor: Mapping[bool, fx.Graph]
    rest: Mapping[bool, fx.Graph]
    copies: bool = False


class SplitAt(nn.Module):
    """A network in two parts, with its own tensors; see `find`.

    Their names are those in the network with `extractor.` or `rest.` before them.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        super().__init__()
        self.extractor = _Part(model, cut.extractor)
        self.rest = _Part(model, cut.rest)
        self._copies = cut.copies

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map H (N, C, H, W) and logits (N, classes) of x."""
        features = self.extractor(x)
        return features, self.rest(features.clone() if self._copies else features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.extract(x)[1]

    def origins(self) -> dict[str, str]:
        """The name that each tensor has in the network that was cut."""
        return {name: name.partition(".")[2] for name in self.state_dict()}


class _Part(nn.Module):
    """The modules and tensors of one side, under their own names, and how they are called."""

    def __init__(self, model: nn.Module, graphs: Mapping[bool, fx.Graph]) -> None:
        super().__init__()
        self._graphs = dict(graphs)
        for graph in graphs.values():
            for node in graph.nodes:
                if node.op in ("call_module", "get_attr"):
                    _adopt(self, model, str(node.target))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = fx.Interpreter(self, graph=self._graphs[self.training]).run(x)
        return result


def find(model: nn.Module, path: str, shape: tuple[int, ...], name: str) -> Cut:
    """The cut of a network behind the module at `path`.

    Args:
        model: takes (N, *shape).
        path: as `named_modules` has it, such as "features.3".
        shape: of one sample.
        name: of the network, for messages.

    Raises:
        StillhouseError: the network is no chain there. The message says why, and where it is one.
    """
    run(
        copy.deepcopy(model).train(), torch.zeros(2, *shape),
        fails=f"{name} fails on images of shape {shape}",
    )  # fmt: skip
    try:
        return _find(model, path, shape)
    except _NoCutError as fault:
        possible = places(model, shape)
        where = f"it can be cut behind {listed(possible)}" if possible else "it can be cut nowhere"
        raise StillhouseError(f'{name}: split = "{path}": {fault}; {where}') from fault


def places(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The modules behind which a network can be cut, in the order in which they run."""
    watched = copy.deepcopy(model).eval()
    calls: dict[str, int] = {}
    for path, part in watched.named_modules():

        def seen(_module: nn.Module, _inputs: object, out: object, path: str = path) -> None:
            if isinstance(out, Tensor) and out.ndim == 4:
                calls[path] = calls.get(path, 0) + 1

        if path:
            part.register_forward_hook(seen)
    try:
        with torch.no_grad():
            watched(torch.zeros(2, *shape))
    except FORWARD_FAULTS:
        return []
    found = []
    for path in (path for path, number in calls.items() if number == 1):
        try:
            _find(model, path, shape)
        except _NoCutError:
            continue
        found.append(path)
    return found


def listed(paths: list[str]) -> str:
    """Paths for a message, the first of many."""
    shown = ", ".join(map(repr, paths[:_LISTED]))
    return shown if len(paths) <= _LISTED else f"{shown} and {len(paths) - _LISTED} more"


class _NoCutError(Exception):
    """Why a network cannot be cut at a place."""


def _find(model: nn.Module, path: str, shape: tuple[int, ...]) -> Cut:
    known = [key for key, _ in model.named_modules(remove_duplicate=False) if key]
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise _NoCutError(f"there is no module {path!r}{hint}")
    extractor, rest = {}, {}
    for training in (True, False):
        whole = _Whole(copy.deepcopy(model).train(training))
        tracer = _Tracer(_INNER + path, shape)
        try:
            graph = tracer.trace(whole)
        except (*FORWARD_FAULTS, fx.proxy.TraceError) as fault:
            parent = path.rpartition(".")[0]
            raise _NoCutError(
                f"the forward pass of {'the network' if not parent else repr(parent)}, or one "
                f"around it, cannot be followed by torch.fx: {_line(fault)}"
            ) from fault
        extractor[training], rest[training] = _halves(graph, whole, _INNER + path, shape)
    cut = Cut(path, extractor, rest)
    both = SplitAt(copy.deepcopy(model), cut)
    inside = {id(tensor): key for key, tensor in _tensors(both.extractor)}
    for key, tensor in _tensors(both.rest):
        if id(tensor) in inside:
            raise _NoCutError(f"tensor {key!r} is used on both sides of it")
    for side, part in (("before", both.extractor), ("behind", both.rest)):
        if next(part.parameters(), None) is None:
            raise _NoCutError(f"there is nothing to learn {side} it")
    return _proven(model, cut, shape)


def _proven(model: nn.Module, cut: Cut, shape: tuple[int, ...]) -> Cut:
    """The cut, after both parts together computed what the network does.

    Whether the rest writes into the feature map is seen on the way.
    """
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    copies = False
    for training in (True, False):
        whole, parts = copy.deepcopy(model), SplitAt(copy.deepcopy(model), cut)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            expected = whole.train(training)(x.clone())
            torch.manual_seed(0)
            features = parts.train(training).extractor(x.clone())
            before = features.clone()
            logits = parts.rest(features)
            copies = copies or not torch.equal(before, features)
        if logits.shape != expected.shape or not torch.allclose(logits, expected, 1e-3, 1e-4):
            raise _NoCutError("the two parts together compute something else than the network")
    return Cut(cut.path, cut.extractor, cut.rest, copies)


class _Whole(nn.Module):
    """Calls the network with one argument, so that all others have their defaults."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class _Tracer(fx.Tracer):
    """Looks into the modules around a path alone; branches on an image's shape are followed."""

    def __init__(self, path: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._path, self._shape = path, shape
        self._running = False

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What a branch depends on, if it is the same for every batch."""
        self._running = True
        try:
            seen = [_values(self.root, self.graph, (n, *self._shape)) for n in (2, 3)]
        finally:
            self._running = False
        two, three = (values[obj.node] for values in seen)
        return two if isinstance(two, bool) and two == three else super().to_bool(obj)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Within `to_bool` modules run."""
        return (
            forward(*args, **kwargs)
            if self._running
            else super().call_module(m, forward, args, kwargs)
        )

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Likewise."""
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        del m
        return not self._path.startswith(f"{module_qualified_name}.")


class _Shape(tuple[int, ...]):
    """The shape of a tensor."""

    __slots__ = ()


class _Values(fx.Interpreter):
    """Notes what each node gives: of a tensor its shape."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = _Shape(value.shape) if isinstance(value, Tensor) else value
        return value


def _halves(
    graph: fx.Graph, whole: nn.Module, path: str, shape: tuple[int, ...]
) -> tuple[fx.Graph, fx.Graph]:
    """The graph up to the module at `path`, and the rest as a function of its output."""
    module = whole.get_submodule(path)
    calls = [
        node for node in graph.nodes
        if node.op == "call_module" and whole.get_submodule(str(node.target)) is module
    ]  # fmt: skip
    if len(calls) != 1:
        often = f"{len(calls)} times" if calls else "nowhere"
        raise _NoCutError(f"it is called {often} in the forward pass, expected once")
    cut = calls[0]
    output = next(node for node in graph.nodes if node.op == "output")
    if cut not in _reached(output):
        raise _NoCutError("the logits do not depend on it")
    values = [_values(whole, graph, (size, *shape)) for size in (2, 3)]
    made = values[0][cut]
    if not isinstance(made, _Shape) or len(made) != 4 or made[0] != 2:
        what = tuple(made) if isinstance(made, _Shape) else type(made).__name__
        raise _NoCutError(f"its output is {what}, expected a feature map (N, C, H, W)")
    numbers = {node for node, value in values[0].items() if _is_number(value)}
    before, after = _reached(cut), _reached(output, frozenset({cut, *numbers}))
    past = (before & after) - numbers - {cut}
    for node in graph.nodes:
        if node in past and any(user in after and user not in before for user in node.users):
            raise _NoCutError(f"{_described(node)} goes past it")
    first, rest = fx.Graph(), fx.Graph()
    copied: dict[fx.Node, Any] = {}
    stands: dict[fx.Node, Any] = {cut: rest.placeholder("h")}
    batch = rest.call_method("size", (stands[cut], 0)) if numbers & after else None
    for node in graph.nodes:
        if node in before:
            copied[node] = _copy(first, node, copied.__getitem__)
        if node in after & numbers:
            stands[node] = _number(rest, node, [v[node] for v in values], stands[cut], batch)
        elif node in after and node is not cut:
            stands[node] = _copy(rest, node, stands.__getitem__)
    first.output(copied[cut])
    return first, rest


def _reached(node: fx.Node, ends: frozenset[fx.Node] = frozenset()) -> set[fx.Node]:
    """A node and all that it depends on, but not what `ends` depend on."""
    found, open_ = {node}, [node]
    while open_:
        last = open_.pop()
        new = set() if last in ends else set(last.all_input_nodes) - found
        found |= new
        open_ += new
    return found


def _is_number(value: object) -> bool:
    """Whether a node gives no tensor, but what is known of every image of one shape."""
    if isinstance(value, tuple) and not isinstance(value, _Shape):
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float | str | torch.dtype | torch.device | None)


def _values(whole: nn.Module, graph: fx.Graph, shape: tuple[int, ...]) -> dict[fx.Node, Any]:
    watched = _Values(copy.deepcopy(whole), graph)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        watched.run(torch.zeros(shape))
    return watched.seen


def _copy(graph: fx.Graph, node: fx.Node, stands: Callable[[fx.Node], Any]) -> fx.Node:
    made = graph.node_copy(node, stands)
    if node.op in ("call_module", "get_attr"):
        made.target = str(node.target).removeprefix(_INNER)
    return made


def _number(
    graph: fx.Graph, node: fx.Node, seen: list[Any], h: fx.Node, size: fx.Node | None
) -> Any:
    """What stands for a number that a node of the first part gives, or for a tuple of such.

    Raises:
        _NoCutError: it follows from the batch in another way than a multiple and a constant.
    """
    two, three = seen
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
    raise _NoCutError(f"{_described(node)} goes past it")


def _described(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the image itself"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    if node.op == "get_attr":
        return f"parameter {str(target).removeprefix(_INNER)!r}"
    what = "module" if node.op == "call_module" else "operation"
    return f"the output of {what} {str(target).removeprefix(_INNER)!r}"


def _adopt(part: nn.Module, model: nn.Module, path: str) -> None:
    """Give a part what stands at a path of the network, under the same path."""
    *above, name = path.split(".")
    owner, place = model, part
    for key in above:
        owner = getattr(owner, key)
        if not hasattr(place, key):
            setattr(place, key, nn.Module())
        place = getattr(place, key)
    found = getattr(owner, name)
    if isinstance(found, nn.Module | nn.Parameter):
        setattr(place, name, found)
    elif name not in place._buffers:  # noqa: SLF001 - a module tells of no other way to ask
        saved = isinstance(found, Tensor) and path in model.state_dict()
        place.register_buffer(name, found, persistent=saved)


def _tensors(part: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()


def _line(fault: Exception) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
