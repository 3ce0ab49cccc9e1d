"""FedAvg (McMahan et al. 2017): devices train the global model, the server averages.

    w <- w + sum_k (n_k / n) * decode(encode(w_k - w))

over the round's devices k with n_k samples each, batch-norm statistics included. With `device.mu`
over 0 devices minimize F_k(w) + mu/2 |w - w_global|^2 instead (FedProx, Li et al. 2020, equation
2); with `device.feedback` each keeps what its codec left out and adds it to its next update (error
feedback, Karimireddy et al. 2019).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import models
from models.average import Average
from models.units import Layout, Units
from orchestrator import admit, distill
from orchestrator.strategies.strategy import Array, Metrics, State, Task
from wire import tensors
from wire.errors import AdmissionError
from wire.messages import Birth, BlobRef, Order, Result


class Share(NamedTuple):
    """What of the global model one device trains: at which keep rate, which units (None: all)."""

    keep_rate: float = 1.0
    units: Units | None = None
    digest: str = ""


class FedAvg:
    """The baseline; `Task.config.device` says what is trained."""

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
                packed[share.digest] = self.task.blobs.put(tensors.pack(named, seed=round_))
            orders[name] = self.task.order(
                name,
                round_,
                sequence,
                share.keep_rate,
                state=packed[share.digest],
                returns={"update": device.update},
                mu=device.mu,
                feedback=device.feedback,
                submodel=share.digest,
            )
        return orders

    def admit(self, state: State, order: Order, result: Result) -> None:
        """Names, shapes, finite values, and a norm that is not absurd."""
        del state
        shapes = self.shapes(self.share_of(order, result.device))
        admit.weights(read_payload(self.task, result, "update"), shapes, self.task.norm)

    def aggregate(
        self, state: State, orders: Mapping[str, Order], results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Fold updates in one by one, so that memory is that of the model."""
        samples = sum(result.samples for result in results)
        average, devices = self.average(state.under("global"), samples), {}
        for i, result in enumerate(results):
            share = self.share_of(orders[result.device], result.device)
            update = read_payload(self.task, result, "update")
            average.add(update, share.units, result.samples)
            devices[result.device] = {"keep_rate": share.keep_rate}
            self.task.progress("aggregate", i + 1, len(results))
        done = average.total()
        after = State({f"global/{n}": a for n, a in done.items()}, {})
        config, round_ = self.task.config, next(iter(orders.values())).round
        due = round_ % config.server.eval_every == 0 or round_ == config.rounds
        scores = {"server_accuracy": self._evaluate(done)} if due else {}
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
        axes = {name: (None,) * array.ndim for name, array in weights.items()}
        whole = Layout({}, axes, {name: array.shape for name, array in weights.items()})
        return Average(weights, whole, samples_total=samples)

    def _evaluate(self, weights: Mapping[str, Array]) -> float:
        device, heldout = self.task.config.device, self.task.heldout
        model = models.build(device.model, classes=device.classes, input_shape=device.input)
        distill.load(model, weights).to(self.task.torch_device)
        logits = distill.predict(model, heldout.x, self.task.config.server.eval_batch)
        return distill.accuracy(logits, heldout.y)


def read_payload(task: Task, result: Result, name: str) -> dict[str, Array]:
    """The tensors of a payload of one record.

    Raises:
        AdmissionError, WireError: it is empty or damaged.
    """
    from wire import frames

    ref = result.blobs[name]
    where = f"payload {name!r} of {result.device}"
    with task.blobs.path(ref.digest).open("rb") as file:
        for frame in frames.read(file, max_bytes=ref.size):
            return tensors.unpack(frame, where=where, most=task.values)
    raise AdmissionError(f"{where} is empty")
