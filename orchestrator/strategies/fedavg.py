"""FedAvg (McMahan et al. 2017): devices train the global model, the server averages.

    w <- w + sum_k (n_k / n) * decode(encode(w_k - w))

over the round's devices k with n_k samples each, batch-norm statistics included. No n_k counts more
than `cohort.max_weight` times the median one. With `device.mu` over 0 devices minimize
F_k(w) + mu/2 |w - w_global|^2 instead (FedProx, Li et al. 2020, equation 2); with `device.feedback`
each keeps what its codec left out and adds it to its next update (error feedback, Karimireddy et
al. 2019).
"""

import hashlib
import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import models
from models.average import Average
from models.units import Units
from orchestrator.config import Recipe
from orchestrator.rules import admit
from orchestrator.strategies.strategy import Array, Metrics, State, Task, evaluated, norm
from orchestrator.training import distill
from wire import tensors
from wire.messages import Birth, BlobRef, Order, Result

log = logging.getLogger("orchestrator")


class Share(NamedTuple):
    """What of the global model one device trains: at which keep rate, which units (None: all)."""

    keep_rate: float = 1.0
    units: Units | None = None
    digest: str = ""


class FedAvg:
    """The baseline; `Task.config.device` says what is trained.

    State: tensors `global/...`; with error feedback, note "owed": for each device the sequence of
    the order whose update was the last of its that was aggregated.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def begin(self) -> State:
        """The initial weights."""
        return State({f"global/{n}": a for n, a in self.task.initial.items()}, {})

    def orders(
        self, state: State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Start from these weights, return the difference."""
        device, weights = self.task.config.device, state.under("global")
        packed: dict[str, BlobRef] = {}  # devices with the same share get the same blob
        orders = {}
        for name, birth in cohort.items():
            share = self.share(name, birth, round_)
            if share.digest not in packed:
                named = tensors.weights(self.cut(weights, share), device.state)
                seed = self._seed(round_, share)
                packed[share.digest] = self.task.blobs.put(tensors.pack(named, seed=seed))
            orders[name] = self.task.order(
                name,
                round_,
                sequence,
                Recipe(device.network, share.keep_rate),
                state=packed[share.digest],
                returns={"update": device.update},
                mu=device.mu,
                feedback=device.feedback,
                owed=state.notes.get("owed", {}).get(name, 0),
                submodel=share.digest,
            )
        return orders

    def admit(self, state: State, order: Order, result: Result) -> None:
        """Names, shapes, finite values, and a norm that is not absurd."""
        del state
        shapes = self.shapes(self.share_of(order, result.device))
        update = read_payload(self.task, order, result, "update")
        admit.weights(update, shapes, norm(self.task.initial))

    def aggregate(
        self, state: State, round_: int, orders: Mapping[str, Order], results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Fold updates in one by one, so that memory is that of the model."""
        config = self.task.config
        median = statistics.median_low(result.samples for result in results)
        counted = [min(r.samples, int(config.cohort.max_weight * median)) for r in results]
        average, devices = self.average(state.under("global"), sum(counted)), {}
        for i, (result, samples) in enumerate(zip(results, counted, strict=True)):
            order = orders[result.device]
            share = self.share_of(order, result.device)
            average.add(read_payload(self.task, order, result, "update"), share.units, samples)
            devices[result.device] = {"keep_rate": share.keep_rate}
            self.task.progress("aggregate", i + 1, len(results))
        done = average.total()
        for name, array in done.items():
            if name.endswith("running_var"):  # rounding by a lossy codec can take it below 0
                np.maximum(array, 0, out=array)
        notes = {}
        if config.device.feedback:
            sent = {result.device: result.sequence for result in results}
            notes = {"owed": {**state.notes.get("owed", {}), **sent}}
        after = State({f"global/{n}": a for n, a in done.items()}, notes)
        scores = {"server_accuracy": self._evaluate(done)} if evaluated(config, round_) else {}
        return after, {**scores, "devices": devices}

    def share(self, name: str, birth: Birth, round_: int) -> Share:
        """What a device is to train in a round."""
        del name, birth, round_
        return Share()

    def share_of(self, order: Order, name: str) -> Share:
        """What a device was told to train."""
        del order, name
        return Share()

    def cut(self, weights: Mapping[str, Array], share: Share) -> Mapping[str, Array]:
        """The weights that go to a device."""
        del share
        return weights

    def shapes(self, share: Share) -> dict[str, tuple[int, ...]]:
        """Of the weights that go to a device."""
        del share
        return {name: array.shape for name, array in self.task.initial.items()}

    def average(self, weights: Mapping[str, Array], samples: int) -> Average:
        """An empty average of updates to `weights`, of devices with `samples` samples in all."""
        return Average(weights, None, samples_total=samples)

    def _seed(self, round_: int, share: Share) -> int:
        """Of the codec of weights on their way down: another for each round and sub-model."""
        key = f"{self.task.config.seed}/{round_}/{share.digest}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little")

    def _evaluate(self, weights: Mapping[str, Array]) -> float:
        device, heldout = self.task.config.device, self.task.heldout
        model = models.build(device.network, classes=device.class_count, input_shape=device.input)
        distill.load(model, weights).to(self.task.torch_device)
        logits = distill.predict(model, heldout.x, self.task.config.server)
        if not np.isfinite(logits).all():
            log.warning(
                "the global model's logits are not finite: training diverged; lower device.lr, or "
                "send vectors as float16 or float32"
            )
        return distill.accuracy(logits, heldout.y)


def read_payload(task: Task, order: Order, result: Result, name: str) -> dict[str, Array]:
    """The tensors of a payload of one frame, by the codecs that were ordered.

    Raises:
        WireError: it is damaged, too large, or came by other codecs.
    """
    return tensors.load(
        task.blobs.path(result.blobs[name].digest),
        where=f"payload {name!r} of {result.device}",
        most=task.values,
        spec=order.returns[name],
    )
