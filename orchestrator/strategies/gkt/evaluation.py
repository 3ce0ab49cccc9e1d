"""Accuracy of FedGKT's networks, on the server's images or on those that devices hold out."""

import numpy as np
from torch import nn

from orchestrator.strategies.gkt import extractors
from orchestrator.strategies.gkt.state import GktState
from orchestrator.strategies.payloads import device_network, heldout_accuracy
from orchestrator.strategies.strategy import Array, Metrics
from orchestrator.strategies.task import Task
from orchestrator.training import ranks
from orchestrator.training.samples import Samples
from wire.errors import RunError


def on_heldout(task: Task, state: GktState, model: nn.Module) -> Metrics:
    """Held-out accuracy of each device's extractor + large model, and of its network.

    The extractor is the one whose feature maps the large model learnt from. The network is the one
    that the device returned or, with `transfer.network = "shared"`, the mean.
    """
    device, names = task.config.device, sorted(state.held)
    large: dict[bytes, float] = {}  # by extractor, so that a shared one is evaluated once
    small: dict[str, float] = {}  # by network, for the same reason
    devices: dict[str, dict[str, float]] = {}
    for name in names:
        weights, model_name = state.extractors[name], device.model_of(name)
        extractor = b"".join(weights[key].tobytes() for key in sorted(weights))
        if extractor not in large:
            stacked = nn.Sequential(extractors.build(task, name, weights), model)
            large[extractor] = heldout_accuracy(task, stacked)
        network = model_name if task.config.transfer.network == "shared" else name
        if network not in small:
            built = device_network(task, name, state.network(model_name, name))
            small[network] = heldout_accuracy(task, built)
        devices[name] = {"server_accuracy": large[extractor], "device_accuracy": small[network]}
        task.progress("evaluate", len(devices), len(names))
    means = {
        key: float(np.mean([scores[key] for scores in devices.values()]))
        for key in ("server_accuracy", "device_accuracy")
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
