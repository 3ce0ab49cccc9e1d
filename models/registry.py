"""Networks by name, for configuration files and command lines.

A name is one of ours (`names`), or says where a user's own network is made (`models.foreign`).
`@layer.path` behind a name cuts the network there, for FedGKT (`models.split`).
"""

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models import foreign, split, submodel
from models.allconv import AllCNN
from models.caldas import CaldasCNN
from models.fastcnn import FastCNN
from models.resnet import DeviceResNet, ResNet, ServerResNet
from wire.errors import StillhouseError
from wire.names import parse, title

Shape = tuple[int, int, int]


@runtime_checkable
class SplitModel(Protocol):
    """A device network that can hand out its feature maps (FedGKT's W_e and W_c in one module)."""

    extractor: nn.Module

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature maps H and logits of a batch; the logits are those of `forward`."""


@dataclass(frozen=True)
class _Entry:
    make: Callable[[int, Shape], nn.Module]
    shape: Shape


def _device(depth: int, *, cut: int = 0, opponent: bool = False) -> _Entry:
    def make(classes: int, shape: Shape) -> nn.Module:
        return DeviceResNet(classes, shape[0], depth=depth, cut=cut, opponent=opponent)

    return _Entry(make, (3, 32, 32))


def _server(n: int) -> _Entry:
    return _Entry(lambda classes, shape: ServerResNet(classes, n, shape[0]), (16, 32, 32))


def _whole(n: int) -> _Entry:
    return _Entry(lambda classes, shape: ResNet(classes, n, shape[0]), (3, 32, 32))


def _fast(width: int, depth: int) -> _Entry:
    return _Entry(
        lambda classes, shape: FastCNN(classes, shape[0], width=width, depth=depth), (16, 32, 32)
    )


def _caldas(classes: int, shape: Shape) -> nn.Module:
    return CaldasCNN(classes, shape, hidden=512 if classes <= 10 else 2048)


_MODELS = {
    "resnet8": _device(8),
    "resnet8-block1": _device(8, cut=1),
    "resnet8-block2": _device(8, cut=2),
    "resnet8-opponent": _device(8, opponent=True),
    "resnet4": _device(4),
    "resnet6": _device(6),
    "resnet10": _server(1),
    "resnet19": _server(2),
    "resnet55": _server(6),
    "resnet109": _server(12),
    "resnet11": _whole(1),
    "resnet20": _whole(2),
    "resnet56": _whole(6),
    "resnet110": _whole(12),
    "fastcnn6-32": _fast(32, 2),
    "fastcnn6-64": _fast(64, 2),
    "fastcnn9-64": _fast(64, 3),
    "fastcnn9-128": _fast(128, 3),
    "caldas_cnn": _Entry(_caldas, (1, 28, 28)),
    "allconv": _Entry(AllCNN, (3, 32, 32)),
}


def names() -> tuple[str, ...]:
    """The names of our networks, and of those that installed packages offer as entry points."""
    return tuple(dict.fromkeys([*_MODELS, *foreign.entry_points()]))


def input_shape(name: str) -> Shape:
    """The shape of one sample (channels, height, width) that the network was published with.

    A network that is not ours has none: (3, 32, 32).

    Raises:
        StillhouseError: no network has this name; the message names the nearest.
    """
    whole, _ = parse(name)
    return _MODELS[whole].shape if _known(whole) is None else (3, 32, 32)


def build(name: str, *, classes: int, input_shape: tuple[int, ...] | None = None) -> nn.Module:
    """A freshly initialised network; the random numbers are torch's, so seed before.

    Args:
        name: one of `names()`, or where a user's own network is made; see the module's docstring.
        classes: number of logits, 2 or more.
        input_shape: of one sample (channels, height, width); default: as published. A server half
            takes the feature map of its device half.

    Raises:
        StillhouseError: an unknown name (the message names the nearest), an impossible size, a
            factory that fails, or a network that cannot be cut there.
    """
    whole, path = parse(name)
    foreign_network = _known(whole)
    if classes < 2:
        raise StillhouseError(f"{title(name)}: expected 2 classes or more, got {classes}")
    if foreign_network is not None:
        shape = (3, 32, 32) if input_shape is None else tuple(input_shape)
        model = foreign_network.make(classes, shape)
    else:
        entry = _MODELS[whole]
        shape = entry.shape if input_shape is None else input_shape
        if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < 4:
            raise StillhouseError(
                f"{name}: expected an input of channels, height, width, at least 4 pixels a side; "
                f"got {shape}"
            )
        model = entry.make(classes, (shape[0], shape[1], shape[2]))
    if not path:
        return model
    key = name, classes, shape
    if key not in _CUTS:
        _CUTS[key] = split.find(model, path, shape, title(whole))
    return split.SplitAt(model, _CUTS[key])


_CUTS: dict[tuple[str, int, tuple[int, ...]], split.Cut] = {}


def sources(name: str) -> Mapping[str, str]:
    """SHA-256 of each source file of a user's network, by path; none for our networks.

    A file that the forward pass imports is listed once that has run.
    """
    foreign_network = _known(parse(name)[0])
    return {} if foreign_network is None else foreign_network.found.sources


def try_out(model: nn.Module, name: str, *, classes: int, shape: tuple[int, ...]) -> Shape | None:
    """Run a network on two samples in both modes; returns the shape of its feature map, if any.

    Raises:
        StillhouseError: it fails, its logits have another shape or type, its weights are not
            float32, or `extract` does not return the extractor's feature maps and the logits.
    """
    model = copy.deepcopy(model)
    odd = next((n for n, p in model.named_parameters() if p.dtype != torch.float32), None)
    if odd:
        raise StillhouseError(
            f"{name}: parameter {odd!r} is {model.get_parameter(odd).dtype}, expected "
            "torch.float32; call .float() on the module"
        )
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        fails = f"{name} fails on images of shape {shape}"
        logits = submodel.run(model.train(training), x, fails=fails)
        if tuple(logits.shape) != (2, classes) or logits.dtype != torch.float32:
            raise StillhouseError(
                f"{name}: expected float32 logits of shape (2, {classes}) for two images, got "
                f"{logits.dtype} of {tuple(logits.shape)}; a factory asks for the number of "
                "logits as `classes`"
            )
    if not isinstance(model, SplitModel):
        return None
    expected = (
        f"{name}: expected extract(x) to return the output of `extractor` (N, channels, height, "
        "width) and the logits of forward(x), got "
    )
    try:
        with torch.no_grad():
            maps, same = model.extract(x)
            features = model.extractor(x)
        sound = features.ndim == 4 and _equal(maps, features) and _equal(same, logits)
    except submodel.FORWARD_FAULTS as fault:
        got = f"{type(fault).__name__}: {submodel.first_line(fault)}"
        raise StillhouseError(f"{expected}{got}") from fault
    if not sound:
        raise StillhouseError(f"{expected}something else")
    return features.shape[1], features.shape[2], features.shape[3]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=1e-3, atol=1e-4))


def _known(name: str) -> foreign.Foreign | None:
    """The user's network of this name; None if it is one of ours."""
    if name in _MODELS:
        foreign.say_clash(name)
        return None
    network = foreign.find(name)
    if network is None:
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.7 if "." in name else 0.4)
        place, dot, last = name.rpartition(".")
        if dot and last == "py":
            near = [f"{name}:factory"]
        elif dot and not near:
            near = [f"{place}:{last}"]
        hint = f"did you mean {near[0]!r}? " if near else ""
        forms = "your own: path/to/file.py:factory or package.module:factory"
        raise StillhouseError(
            f"no model is named {name!r}; {hint}known are: {', '.join(names())}; or name {forms}"
        )
    return network


def inherit(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Copy another network's weights into this one, where name and shape are the same.

    A half of a ResNet takes its part of a whole one, as far as they have the same blocks. The
    device half takes no classifier; the server half does, if the number of classes is the same.

    Args:
        model: the network whose tensors are replaced.
        weights: parameters and buffers of a network of the same kind, or of a whole ResNet.

    Returns:
        How many tensors were taken.
    """
    state = model.state_dict()
    origins = {name: name for name in state}
    if isinstance(model, DeviceResNet | ServerResNet) and "rest.fc.weight" in weights:
        origins = model.origins()
    if isinstance(model, split.SplitAt) and set(weights).isdisjoint(state):
        origins = model.origins()
    offered = {name: weights.get(origin) for name, origin in origins.items()}
    taken = {n: t for n, t in offered.items() if t is not None and t.shape == state[n].shape}
    model.load_state_dict(state | taken)
    return len(taken)


def freeze(model: SplitModel) -> None:
    """Fix the extractor in training: its parameters, and the statistics of its batch norms."""

    def stay(extractor: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
        return nn.Module.train(extractor, mode=False)

    model.extractor.requires_grad_(requires_grad=False)
    model.extractor.train = MethodType(stay, model.extractor)  # type: ignore[method-assign]
    model.extractor.eval()
