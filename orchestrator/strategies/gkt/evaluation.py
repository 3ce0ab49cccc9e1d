"""Accuracy of FedGKT's networks, on the server's images or on those that devices hold out."""

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.strategies.gkt import extractors
from orchestrator.strategies.gkt.state import GktState
from orchestrator.strategies.payloads import device_network, heldout_accuracy
from orchestrator.strategies.strategy import Array, Metrics
from orchestrator.strategies.task import Task
from orchestrator.training import ranks
from orchestrator.training.samples import Samples
from wire.errors import RunError


class AveragedViews(nn.Module):
    """A network whose logits are means over six views of an image, as in Jordan 2024.

    The views are the image and the image moved by one pixel to either end of a diagonal, each also
    mirrored. The image itself and its mirror image weigh as much as the other four.

    Args:
        network: maps images (N, C, H, W) to logits (N, classes).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        height, width = x.shape[2:]
        wide = F.pad(x, (1, 1, 1, 1), "reflect")
        logits = self._both(x) / 4
        for at in (0, 2):
            logits += self._both(wide[:, :, at : at + height, at : at + width]) / 8
        return logits

    def _both(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x) + self.network(x.flip(3))
        return out


def on_heldout(task: Task, state: GktState, model: nn.Module) -> Metrics:
    """Held-out accuracy of each device's extractor + large model, and of its network.

    The extractor is the one whose feature maps the large model learnt from. The network is the one
    that the device returned or, with `transfer.network = "shared"`, the mean. With
    `server.eval_views`, "server_accuracy_averaged" is that of the large model's mean logits over
    several views of an image.
    """
    device, names = task.config.device, sorted(state.held)
    # By extractor, so that a shared one is evaluated once.
    large: dict[bytes, dict[str, float]] = {}
    small: dict[str, float] = {}  # by network, for the same reason
    devices: dict[str, dict[str, float]] = {}
    for name in names:
        weights, model_name = state.made_by[name], device.model_of(name)
        extractor = b"".join(weights[key].tobytes() for key in sorted(weights))
        if extractor not in large:
            stacked = nn.Sequential(extractors.build(task, name, weights), model)
            large[extractor] = {"server_accuracy": heldout_accuracy(task, stacked)}
            if task.config.server.eval_views:
                averaged = heldout_accuracy(task, AveragedViews(stacked))
                large[extractor]["server_accuracy_averaged"] = averaged
        network = model_name if task.config.transfer.network == "shared" else name
        if network not in small:
            built = device_network(task, name, state.network(model_name, name))
            small[network] = heldout_accuracy(task, built)
        devices[name] = {**large[extractor], "device_accuracy": small[network]}
        task.progress("evaluate", len(devices), len(names))
    means = {
        key: float(np.mean([scores[key] for scores in devices.values()]))
        for key in devices[names[0]]
    }
    return {**means, "devices": devices}


def on_left_out(task: Task, state: GktState, model: nn.Module, samples: Samples) -> Metrics:
    """Accuracy on the images left out of training, from z_s and from the logits that devices sent.

    Feature maps of a single view are evaluated in that view.

    Raises:
        RunError: no device leaves any image out.
    """
    right: dict[str, list[Array]] = {"server": [], "device": []}
    names, devices = sorted(state.held), {}
    for name, span, source in zip(names, samples.spans, samples.sources, strict=True):
        assert source.left_out is not None  # noqa: S101 - FedGKT's sources have it
        rows, shard = np.flatnonzero(source.left_out), source.shard
        logits = ranks.teach(model, samples, span, task.config.server)
        for who, z in (("server", logits), ("device", shard.logits)):
            right[who].append(z[rows].argmax(axis=1) == shard.labels[rows])
        devices[name] = {
            f"{who}_accuracy": float(each[-1].mean()) for who, each in right.items() if len(rows)
        }
        task.progress("evaluate", len(devices), len(names))
    if not any(len(each) for each in right["server"]):
        raise RunError("device.holdout leaves no image of any device to evaluate on; raise it")
    means = {f"{who}_accuracy": float(np.concatenate(e).mean()) for who, e in right.items()}
    return {**means, "devices": devices}
