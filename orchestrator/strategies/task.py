"""What a strategy works with: the run's settings, its networks, blobs and held-out images."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from numpy.typing import NDArray
from torch import nn

import models
from orchestrator.config import Recipe, RunConfig
from wire import records
from wire.blobs import BlobStore
from wire.errors import SettingsError
from wire.messages import BlobRef, Order
from wire.names import written

Progress = Callable[[str, int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class HeldOut:
    """Images that no device has: x float32 (N, C, H, W) normalized, y int64 (N,).

    There may be none if devices hold out some of their own. `names` are the class names in the
    order of the file; () if labels are only numbers. `digest` identifies the images.
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
        artifact: blob of its training artifact's manifest, by which devices know it.
        features: shape of one sample's feature map, or None if it has no extractor.
    """

    recipe: Recipe
    artifact: BlobRef
    features: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Task:
    """What a strategy works with.

    Attributes:
        config: of the run.
        run: the run's unique id, by which devices know it.
        variants: every model that the configuration lets devices train, by recipe.
        initial: parameters and buffers of the whole device model before round 1.
        others: parameters and buffers of the other models that devices train, by name.
        blobs: the run's blob store.
        shard_folder: for decoded feature maps.
        heldout: for evaluation.
        torch_device: where large tensors are computed.
        progress: takes (what, done, total); long work calls it now and then.
        pretrained: parameters and buffers that all models begin with; empty: random weights.
    """

    config: RunConfig
    run: str
    variants: Mapping[Recipe, Variant]
    initial: Mapping[str, NDArray[Any]]
    blobs: BlobStore
    shard_folder: Path
    heldout: HeldOut
    torch_device: torch.device
    progress: Progress
    others: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    pretrained: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def initial_of(self, device: str) -> Mapping[str, NDArray[Any]]:
        """Parameters and buffers of a device's model before round 1."""
        return self.initial_of_model(self.config.device.model_of(device))

    def initial_of_model(self, model: str) -> Mapping[str, NDArray[Any]]:
        """Parameters and buffers of one of the device models before round 1."""
        return self.others.get(model, self.initial)

    def build(self, model: str) -> nn.Module:
        """A new network of one of the device models."""
        device = self.config.device
        return models.build(model, classes=device.class_count, input_shape=device.input)

    def settings(self, cls: type[T]) -> T:
        """The strategy's own settings; see `strategy_settings`."""
        return strategy_settings(self.config, cls)

    @property
    def values(self) -> int:
        """How many values the largest of the device models has."""
        every = (self.initial, *self.others.values())
        return max(sum(array.size for array in model.values()) for model in every)

    @property
    def limits(self) -> dict[str, int]:
        """Most bytes of each payload.

        Weights may have twice their size in float32 and 1 MiB; the rest, `max_upload_bytes`.
        """
        weights, maps = 8 * self.values + (1 << 20), self.config.max_upload_bytes
        return {"state": weights, "update": weights, "features": maps, "logits": maps}

    def order(
        self, name: str, round_: int, sequence: int, recipe: Recipe | None = None, **fields: Any
    ) -> Order:
        """An order to device `name`, with the fields filled in that every strategy shares.

        Each device and round has its own seed: if rounding errors were the same everywhere, they
        would not average out.

        Args:
            name: of the device.
            round_: from 1.
            sequence: of the attempt's orders.
            recipe: what the device trains; None: its whole model.
            fields: further fields of the order; they replace the ones filled in.
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
        return Order(self.run, sequence, round_, **(shared | fields))

    def evaluated(self, round_: int) -> bool:
        """Whether a round ends with an evaluation."""
        return round_ % self.config.server.eval_every == 0 or round_ == self.config.rounds


def strategy_settings(config: RunConfig, cls: type[T]) -> T:
    """The table `[strategy_settings]` of run.toml, as the strategy's dataclass.

    Raises:
        SettingsError: a key is unknown, missing or wrong; the message names it.
    """
    if config.strategy_settings and not records.hints(cast("type", cls)):
        raise SettingsError(
            f"strategy_settings: strategy {written(config.strategy)!r} has no settings of its own; "
            "leave the table out"
        )
    return records.build(
        cls, config.strategy_settings, where="strategy_settings", error=SettingsError
    )
