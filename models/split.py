"""Cut a network in two behind one of its modules: FedGKT's W_e and W_c of any chain.

    x -> extractor -> H (N, C, H, W) -> rest -> logits

The network can be cut where all that follows depends on the module's output alone. Each part is a
trace of its calls (`models.halves`), one for training and one for evaluation mode.
"""

import copy
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from models.halves import NoCutError, traced
from models.submodel import FORWARD_FAULTS, run
from wire.errors import StillhouseError

_LISTED = 12  # paths that a message names


@dataclass(frozen=True)
class Cut:
    """Where a network is cut: its two parts, each in training mode (True) and in evaluation mode.

    Attributes:
        extractor: the graph up to there, by mode.
        rest: the graph behind it, by mode.
        copies: whether the rest writes into the feature map, so that it needs a copy.
    """

    extractor: Mapping[bool, fx.Graph]
    rest: Mapping[bool, fx.Graph]
    copies: bool = False


class SplitAt(nn.Module):
    """A network in two parts, which share its tensors; see `find`.

    A tensor keeps its name, with `extractor.` or `rest.` before it.
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
    """One side: its modules and tensors, under their names, and the graph that calls them."""

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
        shape: one sample's.
        name: the network's, for messages.

    Raises:
        StillhouseError: the network is no chain there. The message says why, and where it is one.
    """
    run(
        copy.deepcopy(model).train(), torch.zeros(2, *shape),
        fails=f"{name} fails on images of shape {shape}",
    )  # fmt: skip
    try:
        return _find(model, path, shape)
    except NoCutError as fault:
        possible = places(model, shape)
        where = f"it can be cut behind {listed(possible)}" if possible else "it can be cut nowhere"
        raise StillhouseError(f'{name}: split = "{path}": {fault}; {where}') from fault


def places(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The modules behind which a network can be cut, in the order in which they run."""
    watched = copy.deepcopy(model).eval()
    calls: dict[str, int] = {}
    for path, part in watched.named_modules():

        def count(_module: nn.Module, _inputs: object, out: object, path: str = path) -> None:
            if isinstance(out, Tensor) and out.ndim == 4:
                calls[path] = calls.get(path, 0) + 1

        if path:
            part.register_forward_hook(count)
    try:
        with torch.no_grad():
            watched(torch.zeros(2, *shape))
    except FORWARD_FAULTS:
        return []
    possible = []
    for path in (path for path, number in calls.items() if number == 1):
        try:
            _find(model, path, shape)
        except NoCutError:
            continue
        possible.append(path)
    return possible


def listed(paths: list[str]) -> str:
    """Paths for a message; of many, only the first."""
    shown = ", ".join(map(repr, paths[:_LISTED]))
    return shown if len(paths) <= _LISTED else f"{shown} and {len(paths) - _LISTED} more"


def _find(model: nn.Module, path: str, shape: tuple[int, ...]) -> Cut:
    known = [key for key, _ in model.named_modules(remove_duplicate=False) if key]
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise NoCutError(f"there is no module {path!r}{hint}")
    extractor, rest = {}, {}
    for training in (True, False):
        twin = copy.deepcopy(model).train(training)
        extractor[training], rest[training] = traced(twin, path, shape)
    cut = Cut(extractor, rest)
    both = SplitAt(copy.deepcopy(model), cut)
    inside = {id(tensor): key for key, tensor in _tensors(both.extractor)}
    for key, tensor in _tensors(both.rest):
        if id(tensor) in inside:
            raise NoCutError(f"tensor {key!r} is used on both sides of it")
    for side, part in (("before", both.extractor), ("behind", both.rest)):
        if next(part.parameters(), None) is None:
            raise NoCutError(f"there is nothing to learn {side} it")
    return _proven(model, cut, shape)


def _proven(model: nn.Module, cut: Cut, shape: tuple[int, ...]) -> Cut:
    """The cut, once both parts together have computed what the network does.

    This also finds out whether the rest writes into the feature map.
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
            raise NoCutError("the two parts together compute something else than the network")
    return replace(cut, copies=copies)


def _adopt(part: nn.Module, model: nn.Module, path: str) -> None:
    """Give a part the module or tensor at a path of the network, under the same path."""
    *above, name = path.split(".")
    source, target = model, part
    for key in above:
        source = getattr(source, key)
        if not hasattr(target, key):
            setattr(target, key, nn.Module())
        target = getattr(target, key)
    adopted = getattr(source, name)
    if isinstance(adopted, nn.Module | nn.Parameter):
        setattr(target, name, adopted)
    elif name not in target._buffers:  # noqa: SLF001 - a module offers no other way to ask
        saved = isinstance(adopted, Tensor) and path in model.state_dict()
        target.register_buffer(name, adopted, persistent=saved)


def _tensors(part: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from part.named_parameters()
    yield from part.named_buffers()
