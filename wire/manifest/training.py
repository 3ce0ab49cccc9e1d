"""What a manifest says about the network and its training."""

import math
from dataclasses import dataclass
from typing import Literal

from wire import checks, classes, costs
from wire.manifest.tables import NAME, check_shape


@dataclass(frozen=True)
class ModelInfo:
    """The network.

    Attributes:
        classes: how many logits it has.
        input: shape of one sample.
        keep_rate: share of the units that a sub-model keeps; 1 for the whole network.
        class_names: in the order of the logits; empty if labels are only numbers.
    """

    name: str
    classes: int
    input: tuple[int, ...]
    keep_rate: float
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"model name: expected 1 to 256 printable, got {self.name!r:.80}")
        checks.within("classes", self.classes, 2, 1 << 20)
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(
                f"class_names: expected {self.classes}, one a class, got {len(self.class_names)}"
            )
        if classes.normalized(self.class_names) != self.class_names:
            raise ValueError("class_names: expected Unicode's normal form C")
        check_shape("input", self.input, 1, 4)
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"keep_rate: expected over 0 to 1, got {self.keep_rate}")


@dataclass(frozen=True)
class Preprocess:
    """How pixels become inputs: x = (byte / 255 - mean) / std, with a mean and std a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(m) for m in self.mean):
            raise ValueError(f"mean: expected finite numbers, got {self.mean}")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise ValueError(f"std: expected numbers over 0, got {self.std}")

    def check(self, *, channels: int) -> None:
        """Raise ValueError unless there are as many means and stds as channels."""
        if len(self.mean) != channels or len(self.std) != channels:
            raise ValueError(
                f"preprocess: expected a mean and a std for each of {channels} channels, got "
                f"{len(self.mean)} and {len(self.std)}"
            )


@dataclass(frozen=True)
class OptimizerSettings:
    """The constants of the compiled optimizer.

    `momentum` and `nesterov` belong to sgd; `beta1`, `beta2` and `eps` to adam.
    """

    name: Literal["sgd", "adam"]
    weight_decay: float
    momentum: float | None = None
    nesterov: bool | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        expected = ("momentum", "nesterov") if self.name == "sgd" else ("beta1", "beta2", "eps")
        for key in ("momentum", "nesterov", "beta1", "beta2", "eps"):
            if (getattr(self, key) is not None) != (key in expected):
                raise ValueError(f"{self.name} has the settings {', '.join(expected)}; see {key!r}")
        for key in ("weight_decay", "momentum", "beta1", "beta2", "eps"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{key}: expected 0 or more and less than 1, got {value}")


@dataclass(frozen=True)
class Memory:
    """Memory that the exporter expects training to take on the device, in bytes.

    Attributes:
        tensors: activations and gradients, as ONNX Runtime allocates them.
        process: the agent's whole process at its peak (VmHWM), without its images.
        recomputed: how many nodes run a second time, so that their results need not be kept.
    """

    tensors: int
    process: int
    recomputed: int

    def __post_init__(self) -> None:
        sizes = 0 <= self.tensors <= self.process < 1 << 62
        if not sizes or not 0 <= self.recomputed <= costs.MAX_NODES:
            raise ValueError(
                f"memory: {self.tensors} bytes of tensors in {self.process}, {self.recomputed} "
                f"nodes run again"
            )
