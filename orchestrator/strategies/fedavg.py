"""FedAvg (McMahan et al. 2017): devices train the global model, the server averages.

    w <- w + sum_k (n_k / n) * decode(encode(w_k - w)),   n = sum_k n_k

The sum runs over the round's devices k, which have n_k samples each; w includes batch-norm
statistics. An n_k counts at most `cohort.max_weight` times the median one. If `device.mu` is over
0, devices minimize F_k(w) + mu/2 |w - w_global|^2 instead (FedProx, Li et al. 2020, equation 2).
With `device.feedback` each device adds the error of its codec to its next update (error feedback,
Karimireddy et al. 2019).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from orchestrator.config import RunConfig, unused
from orchestrator.rules import admit
from orchestrator.strategies import global_model
from orchestrator.strategies.global_model import GlobalModel, Update
from orchestrator.strategies.payloads import read_payload, shapes
from orchestrator.strategies.strategy import Checkpoint, Metrics, NoSettings
from orchestrator.strategies.task import Task
from wire.messages import Birth, Order, Result


class FedAvg:
    """The baseline; `Task.config.device` says what devices train."""

    settings: ClassVar[type] = NoSettings

    def __init__(self, task: Task) -> None:
        self.task = task
        self._norm = admit.norm(task.initial)

    @staticmethod
    def check(config: RunConfig) -> None:
        """Accept only one whole model for all devices, and no feature maps."""
        global_model.check(config)
        unused.refuse_submodel(config)

    def begin(self) -> GlobalModel:
        """The initial weights."""
        return GlobalModel(self.task.initial)

    def restore(self, checkpoint: Checkpoint) -> GlobalModel:
        """The weights of a checkpoint."""
        return GlobalModel.unpack(checkpoint)

    def orders(
        self, state: GlobalModel, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Orders to start from w and return the difference."""
        sent = global_model.send(self.task, state.weights, round_)
        return {
            name: global_model.order(self.task, state, name, round_, sequence, sent=sent)
            for name in cohort
        }

    def admit(self, state: GlobalModel, order: Order, result: Result) -> Update:
        """The update, checked: names and shapes as in w, finite values, a norm within limits."""
        update = read_payload(self.task, order, result, "update")
        admit.weights(update, shapes(state.weights), self._norm)
        return Update(update)

    def aggregate(
        self,
        state: GlobalModel,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[Update],
    ) -> tuple[GlobalModel, Metrics]:
        """The equation in the module's docstring, and what came of it."""
        return global_model.aggregate(self.task, state, round_, results, contributions)
