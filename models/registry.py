"""Networks by name, for configuration files and command lines."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from models.allconv import AllCNN
from models.caldas import CaldasCNN
from models.resnet import DeviceResNet, ResNet, ServerResNet
from wire.errors import StillhouseError

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


def _device(depth: int, cut: int = 0) -> _Entry:
    return _Entry(
        lambda classes, shape: DeviceResNet(classes, shape[0], depth=depth, cut=cut), (3, 32, 32)
    )


def _server(n: int) -> _Entry:
    return _Entry(lambda classes, shape: ServerResNet(classes, n, shape[0]), (16, 32, 32))


def _whole(n: int) -> _Entry:
    return _Entry(lambda classes, shape: ResNet(classes, n, shape[0]), (3, 32, 32))


def _caldas(classes: int, shape: Shape) -> nn.Module:
    return CaldasCNN(classes, shape, hidden=512 if classes <= 10 else 2048)


_MODELS = {
    "resnet8": _device(8),
    "resnet8-block1": _device(8, cut=1),
    "resnet8-block2": _device(8, cut=2),
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
    "caldas_cnn": _Entry(_caldas, (1, 28, 28)),
    "allconv": _Entry(AllCNN, (3, 32, 32)),
}


def names() -> tuple[str, ...]:
    """Every name that `build` knows."""
    return tuple(_MODELS)


def input_shape(name: str) -> Shape:
    """The shape of one sample (channels, height, width) that the network was published with.

    Raises:
        StillhouseError: no network has this name; the message names the nearest.
    """
    return _entry(name).shape


def build(name: str, *, classes: int, input_shape: Shape | None = None) -> nn.Module:
    """A freshly initialised network; the random numbers are torch's, so seed before.

    Args:
        name: one of `names()`.
        classes: number of logits, 2 or more.
        input_shape: of one sample (channels, height, width); default: as published. A server half
            takes the feature map of its device half.

    Raises:
        StillhouseError: an unknown name (the message names the nearest) or an impossible size.
    """
    entry = _entry(name)
    if classes < 2:
        raise StillhouseError(f"{name}: expected 2 classes or more, got {classes}")
    shape = entry.shape if input_shape is None else input_shape
    if len(shape) != 3 or min(shape) < 1 or min(shape[1:]) < 4:
        raise StillhouseError(
            f"{name}: expected an input of channels, height, width, at least 4 pixels a side; "
            f"got {shape}"
        )
    return entry.make(classes, shape)


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise StillhouseError(f"no model is named {name!r}; {hint}known are: {', '.join(_MODELS)}")
    return _MODELS[name]


def inherit(model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """Begin with another network's weights: those of the same name and shape.

    A half of a ResNet takes its part of a whole one, as far as it has the same blocks: the device
    half all but its classifier, the server half all, and not the classifier of other classes.

    Args:
        model: whose tensors are replaced.
        weights: parameters and buffers of a network of the same kind, or of a whole ResNet.

    Returns:
        How many tensors were taken.
    """
    own = model.state_dict()
    origins = {name: name for name in own}
    if isinstance(model, DeviceResNet | ServerResNet) and "rest.fc.weight" in weights:
        origins = model.origins()
    found = {name: weights.get(there) for name, there in origins.items()}
    taken = {n: t for n, t in found.items() if t is not None and t.shape == own[n].shape}
    model.load_state_dict(own | taken)
    return len(taken)


def freeze(model: SplitModel) -> None:
    """Let the extractor stay as it is in training: parameters, and statistics of batch norm."""

    def stay(extractor: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001
        return nn.Module.train(extractor, mode=False)

    model.extractor.requires_grad_(requires_grad=False)
    model.extractor.train = MethodType(stay, model.extractor)  # type: ignore[method-assign]
    model.extractor.eval()
