"""A model that all devices train, in rounds of averaging: what FedAvg and Federated Dropout share.

Weights go down to devices. Updates (weights after training minus weights before) come up, and
`models.average` averages them.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import models
from models import average
from orchestrator.strategies.strategy import Checkpoint, Metrics, Weights
from orchestrator.strategies.task import Task
from orchestrator.training import distill
from wire import tensors
from wire.messages import BlobRef, Order, Result

log = logging.getLogger("orchestrator")


@dataclass(frozen=True)
class GlobalModel:
    """The state of averaging.

    Attributes:
        weights: w, parameters and buffers of the whole model.
        owed: with error feedback, for each device the sequence of the order whose update was
            aggregated last. The codec's error in that update is added to the device's next one.
    """

    weights: Weights
    owed: Mapping[str, int] = field(default_factory=dict)

    def pack(self) -> Checkpoint:
        """Tensors `global/...`; with error feedback, note "owed"."""
        notes = {"owed": dict(self.owed)} if self.owed else {}
        return Checkpoint(tensors.with_prefix("global", self.weights), notes)

    @classmethod
    def unpack(cls, checkpoint: Checkpoint) -> "GlobalModel":
        """The state from a checkpoint."""
        return cls(checkpoint.under("global"), checkpoint.notes.get("owed", {}))


def send(task: Task, weights: Weights, round_: int, submodel: str = "") -> BlobRef:
    """Store weights for devices to pull, encoded with `device.state`; returns their blob.

    The codec's seed depends on the run's seed, the round and the sub-model.

    Args:
        task: of the run.
        weights: of the whole model or of a sub-model.
        round_: from 1.
        submodel: digest of the sub-model; "" is the whole model.
    """
    key = hashlib.sha256(f"{task.config.seed}/{round_}/{submodel}".encode())
    seed = int.from_bytes(key.digest()[:6], "little")
    named = tensors.weights(weights, task.config.device.state)
    return task.blobs.put(tensors.pack(named, seed=seed))


def order(
    task: Task,
    state: GlobalModel,
    name: str,
    round_: int,
    sequence: int,
    *,
    sent: BlobRef,
    **fields: Any,
) -> Order:
    """An order to start from the weights `sent`, and to return the difference.

    Args:
        task: of the run.
        state: before the round.
        name: of the device.
        round_: from 1.
        sequence: of the round's orders.
        sent: the blob that `send` returned.
        fields: further arguments of `Task.order`.
    """
    device = task.config.device
    return task.order(
        name,
        round_,
        sequence,
        state=sent,
        returns={"update": device.update},
        mu=device.mu,
        feedback=device.feedback,
        owed=state.owed.get(name, 0),
        **fields,
    )


def counted(task: Task, results: Sequence[Result]) -> list[int]:
    """n_k, the samples that each result counts for; see `models.average.counted`."""
    return average.counted([result.samples for result in results], task.config.cohort.max_weight)


def after(
    task: Task, before: GlobalModel, weights: Weights, results: Iterable[Result]
) -> GlobalModel:
    """The state after a round: `weights`, and the orders whose codec errors are owed.

    Args:
        task: of the run.
        before: the state before the round.
        weights: the averaged ones; negative running variances are set to 0 in place.
        results: of the round.
    """
    for name, array in weights.items():
        if name.endswith("running_var"):  # rounding by a lossy codec can take it below 0
            np.maximum(array, 0, out=array)
    owed: dict[str, int] = {}
    if task.config.device.feedback:
        owed = {**before.owed, **{result.device: result.sequence for result in results}}
    return GlobalModel(weights, owed)


def scores(task: Task, state: GlobalModel, round_: int) -> Metrics:
    """The model's accuracy on held-out images; empty in a round without evaluation."""
    if not task.evaluated(round_):
        return {}
    device, heldout = task.config.device, task.heldout
    model = models.build(device.network, classes=device.class_count, input_shape=device.input)
    distill.load(model, state.weights).to(task.torch_device)
    logits = distill.predict(model, heldout.x, task.config.server)
    if not np.isfinite(logits).all():
        log.warning(
            "the global model's logits are not finite: training diverged; lower device.lr, or "
            "send vectors as float16 or float32"
        )
    return {"server_accuracy": distill.accuracy(logits, heldout.y)}
