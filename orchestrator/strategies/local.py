"""Each device alone: no exchange.

This is the floor that FedGKT (He et al. 2020) and Federated Dropout (Caldas et al. 2018) must beat.
Devices keep their own weights and optimizer, train, and return their weights for evaluation only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from orchestrator.config import RunConfig, unused
from orchestrator.strategies.payloads import (
    Decoded,
    admit_device_weights,
    device_network,
    heldout_accuracy,
)
from orchestrator.strategies.strategy import Checkpoint, Metrics, NoSettings, Weights, joined
from orchestrator.strategies.task import Task
from wire.messages import Birth, Order, Result


@dataclass(frozen=True)
class LocalState:
    """The last network that each device returned, by the device's name."""

    devices: Mapping[str, Weights]

    def pack(self) -> Checkpoint:
        """Tensors `device/<name>/...`."""
        return Checkpoint(joined({"device": joined(self.devices)}))


class Local:
    """Local training only."""

    settings: ClassVar[type] = NoSettings

    def __init__(self, task: Task) -> None:
        self.task = task

    @staticmethod
    def check(config: RunConfig) -> None:
        """Accept only whole models, and nothing to be averaged or distilled."""
        unused.need_heldout(config)
        unused.refuse_holdout(config)
        unused.refuse_submodel(config)
        unused.refuse_transfer(config)
        unused.refuse_updates(config)
        unused.refuse_average(config, "each device trains alone")

    def begin(self) -> LocalState:
        """An empty state: no device has returned a network yet."""
        return LocalState({})

    def restore(self, checkpoint: Checkpoint) -> LocalState:
        """The networks of a checkpoint."""
        return LocalState(checkpoint.by_device("device"))

    def orders(
        self, state: LocalState, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Orders to continue from the device's own weights."""
        del state
        returns = {"state": "float32"}
        return {name: self.task.order(name, round_, sequence, returns=returns) for name in cohort}

    def admit(self, state: LocalState, order: Order, result: Result) -> Decoded:
        """The device's network, checked; see `admit_device_weights`."""
        del state
        return Decoded(admit_device_weights(self.task, order, result))

    def aggregate(
        self,
        state: LocalState,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[Decoded],
    ) -> tuple[LocalState, Metrics]:
        """Keep each device's network, and evaluate it."""
        networks, accuracies = {}, {}
        for result, network in zip(results, contributions, strict=True):
            networks[result.device] = network.tensors
            if self.task.evaluated(round_):
                built = device_network(self.task, result.device, network.tensors)
                accuracies[result.device] = heldout_accuracy(self.task, built)
            self.task.progress("evaluate", len(networks), len(results))
        scores: Metrics = {"devices": {n: {"device_accuracy": a} for n, a in accuracies.items()}}
        if accuracies:
            scores["device_accuracy"] = float(np.mean([*accuracies.values()]))
        return LocalState({**state.devices, **networks}), scores
