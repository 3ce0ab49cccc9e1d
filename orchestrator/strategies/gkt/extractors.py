"""Extractors: the first layers of the devices' networks, whose output travels in FedGKT."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from orchestrator.config import RunConfig
from orchestrator.strategies.payloads import shapes
from orchestrator.strategies.strategy import Array, Weights
from orchestrator.strategies.task import Task
from orchestrator.training import distill
from wire.errors import RunError
from wire.names import written

EXTRACTOR = "extractor."
PROBE = 64  # held-out images on which `moved` compares two extractors


def feature_shape(
    config: RunConfig, networks: Mapping[str, tuple[tuple[int, ...] | None, Weights]]
) -> tuple[int, int, int]:
    """The shape (C, H, W) of the devices' feature maps.

    Args:
        config: of the run.
        networks: (shape of the feature maps, weights) of each device model, by name;
            `launch.networks` has refused models without an extractor.

    Raises:
        RunError: two models' feature maps differ in shape, a shared extractor is asked for and the
            extractors differ, or `transfer.views` is set and feature maps do not have the image's
            height and width.
    """
    shapes_of = {written(name): shape for name, (shape, _) in networks.items()}
    if len(set(shapes_of.values())) > 1:
        raise RunError(
            f"feature maps of the device models differ: {shapes_of}; the large model takes one "
            "shape, use models with one"
        )
    every = [shapes(of_network(weights)) for _, weights in networks.values()]
    if config.transfer.extractor == "shared" and any(one != every[0] for one in every):
        raise RunError(
            f"transfer.extractor: models {', '.join(shapes_of)} have different extractors, of "
            'which there is no mean; use "own"'
        )
    channels, height, width = next(shape for shape in shapes_of.values() if shape)
    image = config.device.input
    if crops(config) and (height, width) != image[1:]:
        raise RunError(
            f"transfer.views: feature maps of {height} x {width} are not crops of images of "
            f"{image[1]} x {image[2]}; use an extractor without strides, or no views"
        )
    return channels, height, width


def crops(config: RunConfig) -> bool:
    """Whether, by the run's settings, the server crops feature maps.

    It is true from the first round on, but the server crops only once the extractor is frozen
    (`TransferConfig.frozen`).
    """
    return config.transfer.views and config.transfer.freeze_after is not None


def of_network(weights: Weights) -> dict[str, Array]:
    """W_e: the extractor's part of a network's weights, by their names in the extractor."""
    cut = len(EXTRACTOR)
    return {n[cut:]: array for n, array in weights.items() if n.startswith(EXTRACTOR)}


def behind(weights: Weights) -> dict[str, Array]:
    """W_c: the weights of what follows the extractor, by their names in the network."""
    return {name: array for name, array in weights.items() if not name.startswith(EXTRACTOR)}


def in_network(extractor: Weights) -> dict[str, Array]:
    """An extractor's weights by their names in the network."""
    return {EXTRACTOR + name: array for name, array in extractor.items()}


def build(task: Task, name: str, weights: Weights) -> nn.Module:
    """A device's extractor in evaluation mode; with `device.clip`, its feature maps are clipped."""
    device = task.config.device
    model = task.build(device.model_of(name))
    extractor = distill.load(model.get_submodule("extractor"), weights)
    extractor = extractor.to(task.torch_device).eval()
    return nn.Sequential(extractor, models.Clip(device.clip)) if device.clip else extractor


@torch.inference_mode()
def moved(task: Task, name: str, before: Weights, after: Weights) -> float:
    """How far an extractor has moved: |H' - H|^2 / |H'|^2 on `PROBE` held-out images."""
    # Evenly spread, since images from a folder lie class by class.
    x = task.heldout.x[:: max(len(task.heldout.x) // PROBE, 1)][:PROBE].to(task.torch_device)
    old, new = (build(task, name, weights)(x) for weights in (before, after))
    return float((new - old).square().sum() / new.square().sum())


@torch.inference_mode()
def fill(task: Task, name: str, weights: Weights) -> NDArray[np.float32]:
    """The feature map of a black image at its middle, far from the border: (channels,)."""
    device = task.config.device
    black = [-mean / std for mean, std in zip(device.mean, device.std, strict=True)]
    x = torch.tensor(black)[None, :, None, None].expand(1, *device.input)
    maps = build(task, name, weights)(x.to(task.torch_device))
    middle: NDArray[np.float32] = maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2].cpu().numpy()
    return middle


@torch.inference_mode()
def mirror(config: RunConfig, model: str, weights: Weights) -> tuple[int, ...] | None:
    """The order of channels in which a map, mirrored, is the map of the mirrored image.

    It exists if for each filter there is one that is its mirror image, as for `opponent_filters`.
    The server then makes the maps of mirrored images itself. None if it does not exist.

    Args:
        config: of the run.
        model: a device network.
        weights: of its extractor.
    """
    device = config.device
    network = models.build(model, classes=device.class_count, input_shape=device.input)
    extractor = distill.load(network.get_submodule("extractor"), weights).eval()
    x = torch.randn(1, *device.input, generator=torch.Generator().manual_seed(0))
    of_mirrored, mirrored = extractor(x.flip(3))[0], extractor(x)[0].flip(2)
    distances = torch.cdist(of_mirrored.flatten(1), mirrored.flatten(1))
    close = distances.amin(dim=1) <= 1e-4 * of_mirrored.flatten(1).norm(dim=1).clamp(min=1)
    return tuple(distances.argmin(dim=1).tolist()) if bool(close.all()) else None
