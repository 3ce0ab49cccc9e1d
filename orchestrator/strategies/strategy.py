"""What a strategy is.

A strategy turns states into states: `begin` makes the first, `orders` says what each device of a
cohort shall do, `admit` looks a payload over, `aggregate` takes a round's results in. It does no
I/O but blobs: the coordinator talks to devices, journals and checkpoints.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.config import Recipe, RunConfig
from wire.blobs import BlobStore
from wire.messages import Birth, BlobRef, Order, Result

Array = NDArray[Any]
Metrics = dict[str, Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class State:
    """All that a strategy has learnt, as a checkpoint holds it.

    Attributes:
        tensors: by name; what is learnt.
        notes: JSON; among them, under "blobs", the digests that must be kept.
    """

    tensors: Mapping[str, Array]
    notes: Mapping[str, Any]

    def blobs(self) -> set[str]:
        """Digests of the blobs that the state refers to."""
        return set(self.notes.get("blobs", ()))

    def under(self, prefix: str) -> dict[str, Array]:
        """The tensors named `prefix/...`, without the prefix."""
        cut = len(prefix) + 1
        return {n[cut:]: a for n, a in self.tensors.items() if n.startswith(prefix + "/")}


@dataclass(frozen=True)
class HeldOut:
    """Images that no device has: x float32 (N, C, H, W) normalized, y int64 (N,).

    There may be none, where devices hold out some of theirs. `names` are those of the classes as
    they are stored, in their order there; () where labels are numbers alone. `digest` is that of
    the images.
    """

    x: torch.Tensor
    y: torch.Tensor
    names: tuple[str, ...] = ()
    digest: str = ""


@dataclass(frozen=True)
class Variant:
    """One of the models that devices train.

    Attributes:
        recipe: what it is.
        artifact: the manifest of its training artifact, by which devices know it.
        features: shape of one sample's feature map, or None where it has no extractor.
    """

    recipe: Recipe
    artifact: BlobRef
    features: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Task:
    """What a strategy works with.

    Attributes:
        config: of the run.
        run: its name for devices, which is its alone.
        variants: what devices train, by recipe; all those that the configuration names.
        initial: parameters and buffers of the whole device model before round 1,
        others: and of other models that devices train, by name.
        blobs: the run's blob store.
        shards: folder for decoded feature maps.
        heldout: for evaluation.
        torch_device: where large tensors are computed.
        progress: (what, done, total), called now and then from long work.
        pretrained: parameters and buffers of the model that all begin with; none: random weights.
    """

    config: RunConfig
    run: str
    variants: Mapping[Recipe, Variant]
    initial: Mapping[str, Array]
    blobs: BlobStore
    shards: Path
    heldout: HeldOut
    torch_device: torch.device
    progress: Progress
    others: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    pretrained: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def initial_of(self, device: str) -> Mapping[str, Array]:
        """Parameters and buffers of a device's model before round 1."""
        model = self.config.device.model_of(device)
        return self.others.get(model, self.initial)

    @property
    def values(self) -> int:
        """How many values the largest of the device models has."""
        every = (self.initial, *self.others.values())
        return max(sum(array.size for array in model.values()) for model in every)

    @property
    def limits(self) -> dict[str, int]:
        """Bytes that a payload may have: weights twice their size in float32, features as set."""
        weights = 8 * self.values + (1 << 20)
        return {
            "state": weights,
            "update": weights,
            "features": self.config.max_upload_bytes,
            "logits": self.config.max_upload_bytes,
        }

    def order(
        self, name: str, round_: int, sequence: int, recipe: Recipe | None = None, **settings: Any
    ) -> Order:
        """An order to device `name` with what is the same for every strategy filled in.

        No recipe is the whole model that the device trains.

        Each device and round has a seed of its own: were rounding errors the same everywhere, they
        would not average out.
        """
        device = self.config.device
        key = hashlib.sha256(f"{self.config.seed}/{round_}/{name}".encode()).digest()
        shared: dict[str, Any] = {
            "artifact": self.variants[recipe or Recipe(device.model_of(name))].artifact,
            "epochs": device.epochs,
            "lr": device.rate(round_, self.config.rounds),
            "temperature": device.temperature,
            "augment": device.augment,
            "holdout": device.holdout,
            "seed": int.from_bytes(key[:6], "little"),
        }
        return Order(self.run, sequence, round_, **(shared | settings))


def evaluated(config: RunConfig, round_: int) -> bool:
    """Whether a round ends with an evaluation."""
    return round_ % config.server.eval_every == 0 or round_ == config.rounds


def norm(weights: Mapping[str, Array]) -> float:
    """Of all values together, by which `admit.weights` knows what is absurd."""
    return math.sqrt(sum(float(np.square(a, dtype=float).sum()) for a in weights.values()))


class Strategy(Protocol):
    """Functions from state to state; see the module's docstring."""

    task: Task

    def begin(self) -> State:
        """The state before round 1."""

    def orders(
        self, state: State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """What each device of the cohort shall do."""

    def admit(self, state: State, order: Order, result: Result) -> None:
        """Look over the result of an order; its blobs are here.

        Raises:
            AdmissionError, WireError: why it must not enter the aggregate.
        """

    def aggregate(
        self, state: State, round_: int, orders: Mapping[str, Order], results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Take in a round's accepted results, in the order of device names.

        Args:
            state: before the round.
            round_: its number, from 1.
            orders: that devices may answer in it; a carried one is of an earlier round.
            results: one or more.

        Returns:
            The next state, and metrics: "server_accuracy" and "device_accuracy" on held-out
            images, from 0 to 1, where they exist, and "devices" with each device's own.
        """
