"""Reading, checking and evaluating a device's payloads, for several strategies."""

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import nn

from orchestrator.rules import admit
from orchestrator.strategies.strategy import Weights
from orchestrator.strategies.task import Task
from orchestrator.training import distill
from wire import tensors
from wire.messages import Order, Result


@dataclass(frozen=True)
class Decoded:
    """A contribution of one payload: its tensors, checked and decoded."""

    tensors: Weights

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return nbytes(self.tensors)


def read_payload(task: Task, order: Order, result: Result, name: str) -> dict[str, NDArray[Any]]:
    """The tensors of a payload of one frame, decoded.

    Raises:
        WireError: it is damaged, too large, or not encoded with the codecs that were ordered.
    """
    return tensors.load(
        task.blobs.path(result.blobs[name].digest),
        where=f"payload {name!r} of {result.device}",
        most=task.values,
        spec=order.returns[name],
    )


def admit_device_weights(task: Task, order: Order, result: Result) -> dict[str, NDArray[Any]]:
    """The network of a device that keeps its own weights: payload "state", checked.

    Raises:
        AdmissionError: names or shapes differ from the device's model, a value is not finite, a
            running variance is negative, or the norm is absurd.
        WireError: as in `read_payload`.
    """
    initial = task.initial_of(result.device)
    weights = read_payload(task, order, result, "state")
    admit.weights(weights, shapes(initial), admit.norm(initial))
    admit.variances(weights)
    return weights


def shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by its name."""
    return {name: array.shape for name, array in weights.items()}


def nbytes(weights: Weights) -> int:
    """Size of the tensors in memory, in bytes."""
    return sum(array.nbytes for array in weights.values())


def device_network(task: Task, name: str, weights: Weights) -> nn.Module:
    """A device's network with these weights, on `Task.torch_device`."""
    model = task.build(task.config.device.model_of(name))
    return distill.load(model, weights).to(task.torch_device)


def heldout_accuracy(task: Task, network: nn.Module) -> float:
    """Accuracy of a network that maps pixels to logits, on the server's held-out images.

    The metric "heldout_accuracy" of a device's result is of images that the device left out.
    """
    logits = distill.predict(network, task.heldout.x, task.config.server)
    return distill.accuracy(logits, task.heldout.y)
