"""FedAvg (McMahan et al. 2017): devices train the global model, the server averages.

    w <- w + sum_k (n_k / n) * decode(encode(w_k - w))

over the round's devices k with n_k samples each, batch-norm statistics included.
"""

from collections.abc import Mapping, Sequence

import numpy as np

import models
from orchestrator import admit, distill
from orchestrator.strategies.strategy import Array, Metrics, State, Task
from wire import tensors
from wire.errors import AdmissionError
from wire.messages import Birth, Order, Result


class FedAvg:
    """The baseline; `Task.config.device` says what is trained."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def begin(self) -> State:
        """The artifact's initial weights."""
        return State({f"global/{n}": a for n, a in self.task.initial().items()}, {})

    def orders(
        self, state: State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """The same for all: start from the global weights, return the difference."""
        device = self.task.config.device
        named = tensors.weights(state.under("global"), device.state)
        ref = self.task.blobs.put(tensors.pack(named, seed=round_))
        returns = {"update": device.update}
        return {
            name: self.task.order(name, round_, sequence, state=ref, returns=returns)
            for name in cohort
        }

    def admit(self, state: State, result: Result) -> None:
        """Names, shapes, finite values, and a norm that is not absurd."""
        specs = self.task.artifact.manifest.state_of("parameter", "buffer")
        reference = float(np.sqrt(sum(np.square(a).sum() for a in state.tensors.values())))
        admit.weights(self._update(result), specs, reference)

    def aggregate(
        self, state: State, round_: int, results: Sequence[Result]
    ) -> tuple[State, Metrics]:
        """Fold updates one by one, so that memory is that of the model."""
        del round_
        total = sum(result.samples for result in results)
        weights = {n: a.astype(np.float64) for n, a in state.under("global").items()}
        for i, result in enumerate(results):
            for name, delta in self._update(result).items():
                weights[name] += (result.samples / total) * delta
            self.task.progress("aggregate", i + 1, len(results))
        done = {n: a.astype(np.float32) for n, a in weights.items()}
        device = self.task.config.device
        model = models.build(device.model, classes=device.classes, input_shape=device.input)
        distill.load(model, done).to(self.task.torch_device)
        heldout = self.task.heldout
        logits = distill.predict(model, heldout.x, self.task.config.server.eval_batch)
        metrics = {"server_accuracy": distill.accuracy(logits, heldout.y)}
        return State({f"global/{n}": a for n, a in done.items()}, {}), metrics

    def _update(self, result: Result) -> dict[str, Array]:
        return read_payload(self.task, result, "update")


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
            return tensors.unpack(frame, where=where)
    raise AdmissionError(f"{where} is empty")
