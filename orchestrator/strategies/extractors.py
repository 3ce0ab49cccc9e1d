"""Extractors, the first layers of the devices' networks, whose output travels in FedGKT.

And what devices share: the mean of their extractors, or of their whole networks.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import models
from orchestrator.config import DeviceConfig, RunConfig
from orchestrator.strategies.strategy import Array, State, Task
from orchestrator.training import distill
from wire.errors import RunError
from wire.messages import Result
from wire.names import written

EXTRACTOR = "extractor."
PROBE = 64  # held-out images that tell how far an extractor has moved


def check(
    config: RunConfig,
    found: Mapping[str, tuple[tuple[int, ...] | None, Mapping[str, Array]]],
) -> tuple[int, int, int]:
    """The shape (C, H, W) of the devices' feature maps.

    Args:
        config: of the run.
        found: of each device model, by name, the shape of its feature maps, None where it has no
            extractor, and its weights.

    Raises:
        RunError: a device model has none, or the feature maps of two differ in shape, or crops of
            images are not crops of feature maps, or extractors differ of which there shall be a
            mean.
    """
    shapes_of = {written(name): shape for name, (shape, _) in found.items()}
    for name, shape in shapes_of.items():
        if shape is None:
            raise RunError(
                f"model {name!r} has no feature extractor, which fedgkt needs; name the module "
                'that it is cut behind (split = "layer.path"), or use resnet8, or strategy fedavg'
            )
    if len(set(shapes_of.values())) > 1:
        raise RunError(
            f"feature maps of the device models differ: {shapes_of}; the large model takes one "
            "shape, use models with one"
        )
    every = [shapes(part(weights)) for _, weights in found.values()]
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
    """Whether the server crops feature maps in place of images."""
    return config.transfer.views and config.transfer.freeze_after is not None


def part(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Of a device's weights those of its extractor, by their names in it."""
    cut = len(EXTRACTOR)
    return {n[cut:]: a for n, a in weights.items() if n.startswith(EXTRACTOR)}


def shapes(weights: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Of each tensor."""
    return {name: array.shape for name, array in weights.items()}


def shared(state: State, model: str) -> dict[str, Array]:
    """The weights that all devices with a model go on with, by their names in it."""
    extractor = {EXTRACTOR + name: array for name, array in state.under("shared").items()}
    return state.under(f"network/{written(model)}") | extractor


def network(state: State, device: DeviceConfig, name: str) -> dict[str, Array]:
    """A device's network: that which it goes on with, if that is shared, or as it trained it."""
    model = device.model_of(name)
    together = state.under(f"network/{written(model)}")
    return shared(state, model) if together else state.under(f"device/{name}")


def begin(task: Task) -> dict[str, Array]:
    """What `shared` reads, before round 1."""
    device, transfer, found = task.config.device, task.config.transfer, {}
    if transfer.extractor == "shared":
        found = {f"shared/{name}": array for name, array in part(task.initial).items()}
    for model in device.models if transfer.network == "shared" else ():
        initial = task.others.get(model, task.initial)
        found |= {
            f"network/{written(model)}/{name}": array for name, array in _rest(initial).items()
        }
    return found


def means(
    task: Task, own: Mapping[str, Mapping[str, Array]], results: Sequence[Result], round_: int
) -> dict[str, Array]:
    """Of what `shared` reads, what a round's results change: means by their samples.

    Of extractors over all devices, of what follows over those with one model. As in FedAvg, nobody
    counts more than `cohort.max_weight` times the median device among them.
    """
    device, transfer, found = task.config.device, task.config.transfer, {}
    most = task.config.cohort.max_weight
    sizes = {result.device: result.samples for result in results}
    if not transfer.frozen(round_):
        mean = _mean({name: part(weights) for name, weights in own.items()}, sizes, most)
        found = {f"shared/{name}": array for name, array in mean.items()}
    for model in device.models if transfer.network == "shared" else ():
        if same := {name: _rest(own[name]) for name in own if device.model_of(name) == model}:
            mean = _mean(same, sizes, most)
            found |= {f"network/{written(model)}/{name}": array for name, array in mean.items()}
    return found


def _rest(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Of a device's weights those behind its extractor."""
    return {name: array for name, array in weights.items() if not name.startswith(EXTRACTOR)}


def _mean(
    each: Mapping[str, Mapping[str, Array]], sizes: Mapping[str, int], most: float
) -> dict[str, Array]:
    median = statistics.median_low(sizes[name] for name in each)
    shares = [min(sizes[name], most * median) for name in each]
    several = [*each.values()]
    return {
        key: np.average([one[key] for one in several], axis=0, weights=shares).astype(np.float32)
        for key in several[0]
    }


def build(task: Task, name: str, weights: Mapping[str, Array]) -> nn.Module:
    """A device's extractor in evaluation mode, and what holds its feature maps to a length."""
    device = task.config.device
    model = models.build(
        device.model_of(name), classes=device.class_count, input_shape=device.input
    )
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
