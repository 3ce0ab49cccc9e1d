"""Federated Dropout (Caldas et al. 2018): each device trains a sub-model of the global model.

    server: cut w_k = w[units_k], encode -> device: decode, train, encode the update
    server: decode, add (n_k / N) * update at units_k

This is the paper's rule, `[submodel] absent = "zero"`. With "holders" each coordinate is averaged
over the devices that hold it (`models.average`). An n_k counts at most `cohort.max_weight` times
the median one.

A device's tier decides its keep rate p, so that small and large devices can share a run.
`[submodel] units` decides which units it keeps in a round. At one keep rate every sub-model keeps
equally many units of each group. So all have tensors of the same shapes, and one training artifact
fits them all. Neither activations nor weights are scaled by 1/p.

Lossy codecs act in both directions. At p = 1 this is FedAvg, bit for bit. `device.mu` and
`device.feedback` mean what they do in FedAvg. Late results are refused, as there: an update counts
only for the weights that it started from. The limit on an update's norm comes from the norm of the
whole model, which no sub-model's exceeds.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from models import Units, submodel
from models.units import shapes_of
from orchestrator.config import Recipe, RunConfig
from orchestrator.rules import admit
from orchestrator.strategies import global_model
from orchestrator.strategies.global_model import GlobalModel, Update
from orchestrator.strategies.payloads import read_payload, shapes
from orchestrator.strategies.strategy import Checkpoint, Metrics, NoSettings
from orchestrator.strategies.task import Task
from wire.messages import Birth, BlobRef, Order, Result

_REMEMBERED = 4096  # sub-models kept in the cache: one per device if units are random


class FedDropout:
    """Federated Dropout; `Task.config.submodel` says what is cut.

    Units depend only on the layout, the keep rate, `submodel.units`, the run's seed, the round and
    the device. A round that is opened again asks for the same ones.

    Raises:
        StillhouseError: the network cannot be cut; see `submodel.layout`.
    """

    settings: ClassVar[type] = NoSettings

    def __init__(self, task: Task) -> None:
        self.task = task
        device = task.config.device
        self._layout = submodel.layout(task.build(device.network), device.input)
        self._rates = {v.artifact.digest: recipe.keep_rate for recipe, v in task.variants.items()}
        self._norm = admit.norm(task.initial)
        self._units_of = functools.lru_cache(_REMEMBERED)(self._drawn)

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
            keep_rate = config.submodel.rate_of(name, birth.platform.memory_bytes)
            units, digest = self._units_of(self._drawn_for(name), keep_rate, round_)
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
                recipe=Recipe(config.device.network, keep_rate),
                submodel=digest,
            )
        return orders

    def admit(self, state: GlobalModel, order: Order, result: Result) -> Update:
        """The update, checked: names and shapes of the sub-model, finite, a norm within limits."""
        # The order's artifact gives the keep rate, after a restart too.
        keep_rate = self._rates[order.artifact.digest]
        units, _ = self._units_of(self._drawn_for(result.device), keep_rate, order.round)
        update = read_payload(self.task, order, result, "update")
        expected = shapes(state.weights) if units is None else shapes_of(self._layout, units)
        admit.weights(update, expected, self._norm)
        return Update(update, units, keep_rate)

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

    def _drawn(self, name: str, keep_rate: float, round_: int) -> tuple[Units | None, str]:
        """The units that a sub-model keeps, and their digest; (None, "") if it is the whole model.

        The digest names the units in the order. The device repeats it in the result, and a result
        with another one is refused.

        Args:
            name: what `_drawn_for` returns.
            keep_rate: p.
            round_: from 1.
        """
        if keep_rate == 1:
            return None, ""
        config = self.task.config
        units = submodel.choose(
            self._layout,
            keep_rate,
            config.submodel.units,
            seed=config.seed,
            round_=round_,
            device=name,
        )
        return units, submodel.digest(units)
