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

from models import Average, Units, average
from models.robust import RobustAverage
from models.units import Layout
from orchestrator.config import RunConfig, unused
from orchestrator.strategies.payloads import Decoded
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


@dataclass(frozen=True)
class Update(Decoded):
    """One device's update of its sub-model: decode(encode(w_k - w + e)).

    Here w are the weights as the device has decoded them, and e is what the codec left out of its
    last aggregated update (0 without `device.feedback`). The server adds the update to its exact w.

    Attributes:
        units: the units that the sub-model has; None: all of them.
        keep_rate: p, 0 < p <= 1.
    """

    units: Units | None = None
    keep_rate: float = 1.0


def check(config: RunConfig) -> None:
    """Accept only one model for all devices, and no feature maps."""
    unused.need_heldout(config)
    unused.refuse_holdout(config)
    unused.refuse_transfer(config)
    unused.refuse_own_networks(config)
    unused.refuse_late_results(config)
    unused.refuse_split(config)
    rule, cut = config.average.rule, config.submodel
    if rule != "mean" and not cut.whole and cut.absent == "zero":
        raise ValueError(
            f'average.rule = "{rule}" is over devices that hold a unit; set submodel.absent = '
            '"holders"'
        )


def send(task: Task, weights: Weights, round_: int, submodel_digest: str = "") -> BlobRef:
    """Store weights for devices to pull, encoded with `device.state`; returns their blob.

    The codec's seed depends on the run's seed, the round and the sub-model.

    Args:
        task: of the run.
        weights: of the whole model or of a sub-model.
        round_: from 1.
        submodel_digest: names the sub-model; "" is the whole model.
    """
    key = hashlib.sha256(f"{task.config.seed}/{round_}/{submodel_digest}".encode())
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
        sequence: of the attempt's orders.
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


def aggregate(
    task: Task,
    before: GlobalModel,
    round_: int,
    results: Sequence[Result],
    updates: Iterable[Update],
    *,
    layout: Layout | None = None,
) -> tuple[GlobalModel, Metrics]:
    """The state after a round, and its metrics.

    Updates are added one by one, so that only one is in memory at a time, but for a robust average.
    Its metrics have each device's distance from the average (`RobustAverage.distances`).

    Args:
        task: of the run.
        before: the state before the round.
        round_: from 1.
        results: of the round.
        updates: of the results, in their order.
        layout: of the whole model; None if no sub-models are trained.
    """
    config = task.config
    samples = average.counted([result.samples for result in results], config.cohort.max_weight)
    total = _average(config, before.weights, layout, sum(samples))
    devices = {}
    for result, n_k, update in zip(results, samples, updates, strict=True):
        total.add(update.tensors, update.units, n_k)  # w += (n_k / n) * update
        devices[result.device] = {"keep_rate": update.keep_rate}
        task.progress("aggregate", len(devices), len(results))
    weights = total.total()
    if isinstance(total, RobustAverage):
        for scores_of, distance in zip(devices.values(), total.distances, strict=True):
            scores_of["distance"] = distance
    for name, array in weights.items():
        if name.endswith("running_var"):  # rounding by a lossy codec can take it below 0
            np.maximum(array, 0, out=array)
    owed: dict[str, int] = {}
    if config.device.feedback:
        owed = {**before.owed, **{result.device: result.sequence for result in results}}
    scores = _scores(task, weights) if task.evaluated(round_) else {}
    return GlobalModel(weights, owed), {**scores, "devices": devices}


def _average(
    config: RunConfig, weights: Weights, layout: Layout | None, samples: int
) -> Average | RobustAverage:
    """The accumulator that `[average]` asks for."""
    absent, chosen = config.submodel.absent, config.average
    if not chosen.robust:
        return Average(weights, layout, samples_total=samples, absent=absent)
    return RobustAverage(
        weights,
        layout,
        rule=chosen.rule,
        hostile=chosen.hostile,
        clip=chosen.clip,
        absent=absent,
    )


def _scores(task: Task, weights: Weights) -> Metrics:
    """The model's accuracy on held-out images."""
    model = distill.load(task.build(task.config.device.network), weights).to(task.torch_device)
    logits = distill.predict(model, task.heldout.x, task.config.server)
    if not np.isfinite(logits).all():
        log.warning(
            "the global model's logits are not finite: training diverged; lower device.lr, or "
            "send vectors as float16 or float32"
        )
    return {"server_accuracy": distill.accuracy(logits, task.heldout.y)}
