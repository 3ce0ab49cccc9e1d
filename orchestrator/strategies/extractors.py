"""Extractors, the first layers of the devices' networks, whose output travels in FedGKT."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from orchestrator import distill
from orchestrator.strategies.strategy import Array, Task

EXTRACTOR = "extractor."
PROBE = 64  # held-out images that tell how far an extractor has moved


def part(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Of a device's weights those of its extractor, by their names in it."""
    cut = len(EXTRACTOR)
    return {n[cut:]: a for n, a in weights.items() if n.startswith(EXTRACTOR)}


def shapes(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Of each tensor."""
    return {name: array.shape for name, array in weights.items()}


def mean(each: Mapping[str, Mapping[str, Array]], sizes: Mapping[str, float]) -> dict[str, Array]:
    """The mean of several extractors, by their devices' samples."""
    names, shares = [*each], [sizes[name] for name in each]
    return {
        key: np.average([each[n][key] for n in names], axis=0, weights=shares).astype(np.float32)
        for key in each[names[0]]
    }


def build(task: Task, name: str, weights: Mapping[str, Array]) -> nn.Module:
    """A device's extractor in evaluation mode, and what holds its feature maps to a length."""
    device = task.config.device
    model = models.build(device.model_of(name), classes=device.classes, input_shape=device.input)
    extractor = model.get_submodule("extractor")
    made = distill.load(extractor, weights).to(task.torch_device).eval()
    return nn.Sequential(made, models.Clip(device.clip)) if device.clip else made


@torch.inference_mode()
def moved(task: Task, name: str, sent: Mapping[str, Array], now: Mapping[str, Array]) -> float:
    """Squared error of held-out feature maps by one extractor, over those by another."""
    x = task.heldout.x[:PROBE].to(task.torch_device)
    old, new = (build(task, name, weights)(x) for weights in (sent, now))
    return float((new - old).square().sum() / new.square().sum())


@torch.inference_mode()
def fill(task: Task, name: str, weights: Mapping[str, Array]) -> NDArray[np.float32]:
    """The feature map of a black image, far from its border: (channels,)."""
    device = task.config.device
    black = [-mean / std for mean, std in zip(device.mean, device.std, strict=True)]
    x = torch.tensor(black)[None, :, None, None].expand(1, *device.input)
    maps = build(task, name, weights)(x.to(task.torch_device))
    middle: NDArray[np.float32] = maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2].cpu().numpy()
    return middle
