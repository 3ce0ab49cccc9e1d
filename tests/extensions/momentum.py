"""A user's own strategy, in one file outside Stillhouse: FedAvg with momentum on the server.

Hsu et al. 2019 (arXiv 1909.06335), FedAvgM, with the updates d_k of devices with n_k samples each:

    v <- beta v + sum_k (n_k / n) d_k
    w <- w + v

    strategy = "momentum.py:FedAvgM"    # in run.toml
    [strategy_settings]
    beta = 0.5
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from models.average import counted, mean
from orchestrator.config import RunConfig, unused
from orchestrator.rules import admit
from orchestrator.strategies import Checkpoint, Metrics, Task
from orchestrator.strategies.payloads import (
    Weights,
    device_network,
    heldout_accuracy,
    nbytes,
    read_payload,
    shapes,
)
from wire import tensors
from wire.messages import Birth, Order, Result


@dataclass(frozen=True)
class Settings:
    """`[strategy_settings]` in run.toml."""

    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta: expected 0 to below 1, got {self.beta}")


@dataclass(frozen=True)
class Momentum:
    """The state: w and v."""

    weights: Weights
    velocity: Weights

    def pack(self) -> Checkpoint:
        """The state as a checkpoint; `orchestrator export` looks for the model under "global"."""
        packed = tensors.with_prefix("global", self.weights)
        return Checkpoint(packed | tensors.with_prefix("velocity", self.velocity))


@dataclass(frozen=True)
class Update:
    """A device's contribution: d_k."""

    tensors: Weights

    @property
    def nbytes(self) -> int:
        """Its memory in bytes."""
        return nbytes(self.tensors)


class FedAvgM:
    """FedAvg with momentum."""

    settings = Settings

    def __init__(self, task: Task) -> None:
        self.task = task
        self.beta = task.settings(Settings).beta

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse settings that the strategy does not support, such as sub-models."""
        unused.need_heldout(config)
        unused.refuse_submodel(config)
        unused.refuse_transfer(config)
        unused.refuse_own_networks(config)
        unused.refuse_late_results(config)

    def begin(self) -> Momentum:
        """The initial weights, with v = 0."""
        w = self.task.initial
        return Momentum(w, {name: np.zeros_like(array) for name, array in w.items()})

    def restore(self, checkpoint: Checkpoint) -> Momentum:
        """The state that was packed."""
        return Momentum(checkpoint.under("global"), checkpoint.under("velocity"))

    def orders(
        self, state: Momentum, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Orders to start from w and return the difference."""
        device = self.task.config.device
        named = tensors.weights(state.weights, device.state)
        sent = self.task.blobs.put(tensors.pack(named, seed=round_))
        returns = {"update": device.update}
        return {
            name: self.task.order(name, round_, sequence, state=sent, returns=returns)
            for name in cohort
        }

    def admit(self, state: Momentum, order: Order, result: Result) -> Update:
        """The update, if it has w's names and shapes, finite values, and no absurd norm."""
        update = read_payload(self.task, order, result, "update")
        admit.weights(update, shapes(state.weights), admit.norm(state.weights))
        return Update(update)

    def aggregate(
        self,
        state: Momentum,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[Update],
    ) -> tuple[Momentum, Metrics]:
        """v <- beta v + mean update, w <- w + v."""
        limit = self.task.config.cohort.max_weight
        samples = counted([result.samples for result in results], limit)
        mean_update = mean([each.tensors for each in contributions], samples)
        v = {name: self.beta * state.velocity[name] + d for name, d in mean_update.items()}
        w = {name: array + v[name] for name, array in state.weights.items()}
        metrics: Metrics = {"devices": {}}
        if self.task.evaluated(round_):
            network = device_network(self.task, results[0].device, w)
            metrics["server_accuracy"] = heldout_accuracy(self.task, network)
        return Momentum(w, v), metrics
