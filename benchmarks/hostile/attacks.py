"""The attacks: what hostile devices train on, and what they send instead of their update.

    none          nothing
    sign flips    the update times -5
    noise         Gaussian noise, ten times as long as the update
    label flips   training with label y as classes - 1 - y
    backdoor      training with a white square in a corner of every second image, and label 0 for
                  those; the update times 5, so that an average of five devices is the attacker's
                  model (Bagdasaryan et al. 2020, arXiv 1807.00459)

Hostile devices are simulated by the server's strategy, which changes what they sent.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.strategies.fedavg import FedAvg
from orchestrator.strategies.feddropout import FedDropout
from orchestrator.strategies.global_model import GlobalModel, Update
from orchestrator.strategies.task import Task
from wire import seeds
from wire.messages import Order, Result

Attack = Literal["none", "sign flips", "noise", "label flips", "backdoor"]
TARGET = 0  # class of the backdoor
SQUARE = 4  # pixels of a side
FLIP, NOISE, BOOST = -5.0, 10.0, 5.0


def hostile(devices: int, share: float) -> list[str]:
    """The names of the hostile devices: the last ones."""
    return [f"device-{n}" for n in range(devices - int(share * devices), devices)]


def poison(shards: Path, folder: Path, attack: Attack, names: list[str]) -> None:
    """Copy shards into a folder, with the hostile devices' images or labels changed."""
    if folder.exists():
        return
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(shards, new)
    for name in names:
        path = new / f"{name}.npz"
        with np.load(path) as held:
            arrays = {key: held[key] for key in held.files}
        x, y = arrays["x"], arrays["y"]
        if attack == "label flips":
            y = (len(arrays["classes"]) - 1 - y).astype(y.dtype)
        if attack == "backdoor":
            x, y = x.copy(), y.copy()
            x[::2], y[::2] = triggered(x[::2]), TARGET
        np.savez(path, **{**arrays, "x": x, "y": y})
    new.rename(folder)


def triggered(x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, H, W, C) with the backdoor's white square."""
    shown = x.copy()
    shown[:, -SQUARE:, -SQUARE:] = 255
    return shown


@dataclass(frozen=True)
class Hostile:
    """What hostile devices send, and who they are."""

    attack: Attack
    devices: tuple[str, ...]


def _sent(update: Update, chosen: Hostile, result: Result, seed: int) -> Update:
    """What a device sends instead of its update."""
    if result.device not in chosen.devices:
        return update
    tensors: dict[str, NDArray[Any]] = dict(update.tensors)
    if chosen.attack == "noise":
        raw = seeds.raw(seed, (result.round << 16) + int(result.device.rpartition("-")[2]), 1)
        rng = np.random.default_rng(raw.tolist())
        for name, array in tensors.items():
            deviation = NOISE * float(np.sqrt(np.square(array).mean()))
            tensors[name] = (deviation * rng.standard_normal(array.shape)).astype(np.float32)
        return replace(update, tensors=tensors)
    scale = {"sign flips": FLIP, "backdoor": BOOST}.get(chosen.attack, 1.0)
    return replace(update, tensors={name: scale * array for name, array in tensors.items()})


class _WithHostile:
    """A strategy's mixin: hostile devices' updates are changed after the strategy's own checks."""

    settings: ClassVar[type] = Hostile
    task: Task

    def admit(self, state: GlobalModel, order: Order, result: Result) -> Update:
        """The update of an honest device, or what a hostile one sends instead."""
        update: Update = super().admit(state, order, result)  # type: ignore[misc]
        return _sent(update, self.task.settings(Hostile), result, self.task.config.seed)


class Attacked(_WithHostile, FedAvg):
    """FedAvg with hostile devices."""


class AttackedDropout(_WithHostile, FedDropout):
    """Federated Dropout with hostile devices."""
