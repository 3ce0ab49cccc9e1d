"""Federated Dropout (Caldas et al. 2018): each device trains a sub-model of the global model.

    server: cut w_k = w[units_k], encode -> device: decode, train, encode the update
    server: decode, add (n_k / N) * update at units_k

A device's tier decides its keep rate p, so that small and large devices can share a run.
`[submodel] units` decides which units it keeps in a round. Lossy codecs act in both directions.
At p = 1 this is FedAvg, bit for bit. `device.mu` and `device.feedback` mean what they do in FedAvg.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from models import Units, submodel
from models.units import all_places
from orchestrator.config import Recipe, RunConfig
from orchestrator.rules import admit
from orchestrator.strategies import global_model
from orchestrator.strategies.global_model import GlobalModel, Update
from orchestrator.strategies.payloads import read_payload, shapes
from orchestrator.strategies.strategy import Checkpoint, Metrics, NoSettings, Weights
from orchestrator.strategies.task import Task
from wire.messages import Birth, BlobRef, Order, Result

_REMEMBERED = 4096  # sub-models kept in the cache: one per device if units are random


class FedDropout:
    """Federated Dropout; `Task.config.submodel` says what is cut.

    Units depend only on seed, round and device.

    Raises:
        StillhouseError: a module's channels cannot be traced; the message names the module.
    """

    settings: ClassVar[type] = NoSettings

    def __init__(self, task: Task) -> None:
        self.task = task
        device = task.config.device
        self._layout = submodel.layout(task.build(device.network), device.input)
        self._rates = {v.artifact.digest: recipe.keep_rate for recipe, v in task.variants.items()}
        self._norm = admit.norm(task.initial)
        self._submodel = functools.lru_cache(_REMEMBERED)(self._drawn)

    @staticmethod
    def check(config: RunConfig) -> None:
        """Accept only one model for all and no feature maps; error feedback needs fixed units."""
        global_model.check(config)
        cut = config.submodel
        if config.device.feedback and cut.units != "ordered" and not cut.whole:
            raise ValueError(
                "device.feedback: what a codec left out belongs to the same units in every round; "
                'use submodel.units = "ordered", or whole models'
            )

    def begin(self) -> GlobalModel:
        """The initial weights of the whole model."""
        return GlobalModel(self.task.initial)

    def restore(self, checkpoint: Checkpoint) -> GlobalModel:
        """The weights of a checkpoint."""
        return GlobalModel.unpack(checkpoint)

    def orders(
        self, state: GlobalModel, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """Start from the weights of your sub-model, return the difference."""
        config = self.task.config
        sent: dict[str, BlobRef] = {}  # devices with the same sub-model get the same blob
        orders = {}
        for name, birth in cohort.items():
            rate = config.submodel.rate_of(name, birth.platform.memory_bytes)
            units, digest = self._submodel(self._drawn_for(name), rate, round_)
            if digest not in sent:
                weights = state.weights
                if units is not None:
                    weights = submodel.cut(weights, self._layout, units)
                sent[digest] = global_model.send(self.task, weights, round_, digest)
            orders[name] = global_model.order(
                self.task,
                state,
                name,
                round_,
                sequence,
                sent=sent[digest],
                recipe=Recipe(config.device.network, rate),
                submodel=digest,
            )
        return orders

    def admit(self, state: GlobalModel, order: Order, result: Result) -> Update:
        """The update, checked: names and shapes of the sub-model, finite, a norm within limits."""
        # The order's artifact gives the keep rate, after a restart too.
        rate = self._rates[order.artifact.digest]
        units, _ = self._submodel(self._drawn_for(result.device), rate, order.round)
        update = read_payload(self.task, order, result, "update")
        admit.weights(update, self._shapes(state.weights, units), self._norm)
        return Update(update, units, rate)

    def aggregate(
        self,
        state: GlobalModel,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[Update],
    ) -> tuple[GlobalModel, Metrics]:
        """Add each update at the units of its sub-model; see `models.average`."""
        return global_model.aggregate(
            self.task, state, round_, results, contributions, layout=self._layout
        )

    def _drawn_for(self, name: str) -> str:
        """The device's name if its units are its own; "" if all with its keep rate share them."""
        return name if self.task.config.submodel.units == "random" else ""

    def _drawn(self, name: str, rate: float, round_: int) -> tuple[Units | None, str]:
        """The units that a sub-model keeps, and their digest; (None, "") if it is the whole model.

        By the digest device and server agree on the units.

        Args:
            name: what `_drawn_for` returns.
            rate: its keep rate.
            round_: from 1.
        """
        if rate == 1:
            return None, ""
        config = self.task.config
        units = submodel.choose(
            self._layout,
            rate,
            config.submodel.units,
            seed=config.seed,
            round_=round_,
            device=name,
        )
        return units, submodel.digest(units)

    def _shapes(self, weights: Weights, units: Units | None) -> dict[str, tuple[int, ...]]:
        """The shapes of a sub-model's weights."""
        if units is None:
            return shapes(weights)
        at = all_places(self._layout, units)
        return {
            name: (*map(len, at[name]), *shape[len(at[name]) :])
            for name, shape in self._layout.shapes.items()
        }
