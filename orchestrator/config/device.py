"""What devices train, and how their payloads are coded."""

import fnmatch
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from orchestrator.config.ranges import codec, expect
from wire import classes, codecs, names, tensors
from wire.messages import check_noise


class Recipe(NamedTuple):
    """What differs between a run's training artifacts.

    With `frozen` the extractor is not trained, and its batch-norm statistics do not change.
    """

    model: str
    keep_rate: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class Other:
    """Devices that train another model than the rest.

    Attributes:
        model: a network's name; see `models.registry`.
        devices: a pattern of device names, such as `zero-*`.
        split: as in `DeviceConfig`.
    """

    model: str
    devices: str
    split: str = ""

    @property
    def network(self) -> str:
        """The model with its split."""
        return names.cut(self.model, self.split)


@dataclass(frozen=True)
class DeviceConfig:
    """What each device trains, and how its payloads are coded.

    Attributes:
        model: a network's name; see `models.registry`.
        split: for a model without its own extractor, the path of the module whose output is the
            feature map, such as `features.3` (fedgkt).
        others: devices with another model (fedgkt, local); the first entry that matches a device
            decides. Their feature maps must have the same shape.
        classes: the names of the classes in the order of the logits, or their number.
        input: channels, height, width.
        mean, std: of the pixels on the 0..1 scale, per channel. If left out, `default_pixels` gives
            them.
        batch, epochs, lr, optimizer, momentum, weight_decay: of local training.
        schedule: of the learning rate. "constant"; "cosine", from lr to 0 over the rounds.
        alpha, temperature: of the distillation term (FedGKT).
        mu: weight of the proximal term (FedProx); 0: no term.
        augment: random crop with padding 4 and horizontal flip.
        holdout: share of each device's images that it does not train on, drawn by their digest. The
            device reports its accuracy on them, and the server evaluates on them if it has no
            images of its own (fedgkt).
        clip, noise: feature maps are scaled to an L2 norm of at most `clip`, and get Gaussian noise
            of deviation noise * clip; 0: neither. This is local differential privacy of each map
            sent, and of nothing else: logits, labels and the device's weights are sent unchanged.
        features: codec spec of feature maps.
        update, state: codec specs of updates (up) and weights (down), as MATRICES[/VECTORS]:
            `eden|b=2/float16`.
        feedback: each device adds the codec's error in its last update to its next update.
    """

    model: str = "resnet8"
    split: str = ""
    classes: int | tuple[str, ...] = 10
    input: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    batch: int = 32
    epochs: int = 1
    lr: float = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"
    alpha: float = 1.0
    temperature: float = 3.0
    mu: float = 0.0
    augment: bool = False
    holdout: float = 0.0
    clip: float = 0.0
    noise: float = 0.0
    features: str = "identity|q=8"
    update: str = "float32"
    state: str = "float32"
    feedback: bool = False
    others: tuple[Other, ...] = ()

    @property
    def network(self) -> str:
        """The main model with its split."""
        return names.cut(self.model, self.split)

    def model_of(self, device: str) -> str:
        """The name of a device's model, with its split."""
        fits = (o.network for o in self.others if fnmatch.fnmatchcase(device, o.devices))
        return next(fits, self.network)

    def rate(self, round_: int, rounds: int) -> float:
        """The learning rate of a round, from 1, in a run of `rounds` rounds."""
        return self.lr if self.schedule == "constant" else cosine(self.lr, (round_ - 1) / rounds)

    @property
    def class_count(self) -> int:
        """How many classes there are."""
        return self.classes if isinstance(self.classes, int) else len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of the logits; () if `classes` is a number."""
        return () if isinstance(self.classes, int) else self.classes

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that a device may train, with its split, `model` first."""
        return tuple(dict.fromkeys([self.network, *(other.network for other in self.others)]))

    @property
    def pixels(self) -> str:
        """The mean and deviation that pixels are normalized by, as text."""
        mean, std, name = default_pixels(self.input[0])
        values = f"mean {_values(self.mean)}, std {_values(self.std)}"
        if (self.mean, self.std) != (mean, std):
            return f"pixels are normalized by {values}"
        return (
            f"pixels are normalized by {name}: {values}; set device.mean and device.std for those "
            "of your images"
        )

    def __post_init__(self) -> None:
        if not isinstance(self.classes, int):
            object.__setattr__(self, "classes", classes.normalized(self.classes))
        mean, std, _ = default_pixels(self.input[0])
        object.__setattr__(self, "mean", self.mean or mean)
        object.__setattr__(self, "std", self.std or std)
        codec("features", self.features, codecs.parse)
        codec("state", self.state, tensors.policy)
        expect("mu", self.mu, self.mu >= 0, "0 (no proximal term) or more")
        sent = codec("update", self.update, tensors.policy)
        for used in (sent.matrices, sent.vectors) if self.feedback else ():
            if not (used.spec.startswith("float") or "mse" in used.spec.split("|")):
                raise ValueError(
                    f"feedback: {used.spec} may leave out more than it was given, and what is "
                    "owed then grows without bound; use a codec of least error, eden|b=1|mse"
                )
        if not len(self.mean) == len(self.std) == self.input[0]:
            raise ValueError(
                f"input {list(self.input)}: expected [channels, height, width], with a mean "
                f"({len(self.mean)}) and a std ({len(self.std)}) a channel"
            )
        expect("holdout", self.holdout, 0 <= self.holdout < 1, "a share from 0 to below 1")
        check_noise(self.clip, self.noise)
        expect("classes", self.class_count, self.class_count >= 2, "2 or more")
        expect("batch", self.batch, self.batch >= 1, "1 or more")
        expect("epochs", self.epochs, self.epochs >= 1, "1 or more")
        expect("lr", self.lr, self.lr > 0, "over 0")
        expect("std", self.std, min(self.std, default=1) > 0, "numbers over 0")
        if self.optimizer == "sgd":
            expect("momentum", self.momentum, 0 <= self.momentum < 1, "0 to below 1")
        expect("weight_decay", self.weight_decay, 0 <= self.weight_decay < 1, "0 to below 1")


def default_pixels(channels: int) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and standard deviation of pixels by channel, and whose they are.

    For three channels, CIFAR-10's training images; for one, the same in grey (Pillow's "L"); for
    other numbers, a guess.
    """
    if channels == 3:
        return (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "CIFAR-10's"
    if channels == 1:
        return (0.4809,), (0.2392,), "CIFAR-10's in grey"
    return (0.5,) * channels, (0.25,) * channels, "a guess"


def _values(numbers: tuple[float, ...]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def cosine(lr: float, done: float) -> float:
    """The learning rate after a share `done` of training: from lr to 0 along half a cosine."""
    return lr * (1 + math.cos(math.pi * min(done, 1))) / 2
