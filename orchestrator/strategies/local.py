"""Each device alone: no exchange. The floor that both papers compare with.

Devices keep their own weights and optimizer, train, and return their weights for evaluation only.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

import models
from orchestrator.rules import admit
from orchestrator.strategies.fedavg import read_payload
from orchestrator.strategies.strategy import Array, Metrics, State, Task, evaluated, norm
from orchestrator.training import distill
from wire.messages import Birth, Order, Result


class Local:
    """Local training only."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def begin(self) -> State:
        """Nothing is learnt yet."""
        return State({}, {})

    def orders(
        self, state: State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Go on with your own weights."""
        del state
        returns = {"state": "float32"}
        return {name: self.task.order(name, round_, sequence, returns=returns) for name in cohort}

    def admit(self, state: State, order: Order, result: Result) -> None:
        """Names, shapes and finite values."""
        del state
        admit_own_weights(self.task, order, result)

    def aggregate(
        self, state: State, round_: int, orders: Mapping[str, Order], results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Evaluate each device's own classifier."""
        tensors, devices = dict(state.tensors), {}
        for i, result in enumerate(results):
            weights = read_payload(self.task, orders[result.device], result, "state")
            tensors |= {f"device/{result.device}/{n}": a for n, a in weights.items()}
            if evaluated(self.task.config, round_):
                right = evaluate_device(self.task, device_model(self.task, result.device, weights))
                devices[result.device] = {"device_accuracy": right}
            self.task.progress("evaluate", i + 1, len(results))
        scores: Metrics = {"devices": devices}
        if devices:
            scores["device_accuracy"] = float(
                np.mean([device["device_accuracy"] for device in devices.values()])
            )
        return State(tensors, {}), scores


def admit_own_weights(task: Task, order: Order, result: Result) -> None:
    """Look over the "state" payload of a device that keeps its own weights."""
    initial = task.initial_of(result.device)
    shapes = {name: array.shape for name, array in initial.items()}
    own = read_payload(task, order, result, "state")
    admit.weights(own, shapes, norm(initial))
    admit.variances(own)


def device_model(task: Task, name: str, weights: Mapping[str, Array]) -> nn.Module:
    """A device's model with its weights, where large tensors are computed."""
    device = task.config.device
    model = models.build(
        device.model_of(name), classes=device.class_count, input_shape=device.input
    )
    return distill.load(model, weights).to(task.torch_device)


def evaluate_device(task: Task, model: nn.Module) -> float:
    """Accuracy of a device's own classifier on held-out images."""
    logits = distill.predict(model, task.heldout.x, task.config.server)
    return distill.accuracy(logits, task.heldout.y)
