"""Federated Dropout (Caldas et al. 2018): each device trains a sub-model of the global model.

    server: cut w_k = w[units_k], encode -> device: decode, train, encode the update
    server: decode, add (n_k / N) * update at units_k

A device's tier decides its keep rate p, so that small and large devices can share a run.
`[submodel] units` decides which units it keeps in a round. Lossy codecs act in both directions.
At p = 1 this is FedAvg, bit for bit. `device.mu` and `device.feedback` mean what they do in FedAvg.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import models
from models import Average, Units, submodel
from models.units import all_places
from orchestrator.config import Recipe, RunConfig, unused
from orchestrator.rules import admit
from orchestrator.strategies import global_model
from orchestrator.strategies.global_model import GlobalModel
from orchestrator.strategies.payloads import nbytes, read_payload, shapes
from orchestrator.strategies.strategy import Checkpoint, Metrics, NoSettings, Weights
from orchestrator.strategies.task import Task
from wire.messages import Birth, BlobRef, Order, Result

_REMEMBERED = 4096  # sub-models kept in the cache: one per device if units are random


class Submodel(NamedTuple):
    """What one device trains in one round.

    Attributes:
        keep_rate: p, 0 < p <= 1.
        units: the units that it keeps; None: all of them.
        digest: digest of the units, so that device and server agree on them; "": all.
    """

    keep_rate: float
    units: Units | None = None
    digest: str = ""


@dataclass(frozen=True)
class SubmodelUpdate:
    """One device's update of its sub-model."""

    tensors: Weights
    submodel: Submodel

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        return nbytes(self.tensors)


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
        model = models.build(device.network, classes=device.class_count, input_shape=device.input)
        self._layout = submodel.layout(model, device.input)
        self._rates = {v.artifact.digest: recipe.keep_rate for recipe, v in task.variants.items()}
        self._norm = admit.norm(task.initial)
        self._submodel = functools.lru_cache(_REMEMBERED)(self._drawn)

    @staticmethod
    def check(config: RunConfig) -> None:
        """Accept only one model for all and no feature maps; error feedback needs fixed units."""
        unused.need_heldout(config)
        unused.refuse_holdout(config)
        unused.refuse_transfer(config)
        unused.refuse_own_networks(config)
        unused.refuse_late_results(config)
        unused.refuse_split(config)
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
            chosen = self._submodel(self._drawn_for(name), rate, round_)
            if chosen.digest not in sent:
                weights = self._cut(state.weights, chosen)
                sent[chosen.digest] = global_model.send(self.task, weights, round_, chosen.digest)
            orders[name] = global_model.order(
                self.task,
                state,
                name,
                round_,
                sequence,
                sent=sent[chosen.digest],
                recipe=Recipe(config.device.network, rate),
                submodel=chosen.digest,
            )
        return orders

    def admit(self, state: GlobalModel, order: Order, result: Result) -> SubmodelUpdate:
        """The update, checked: names and shapes of the sub-model, finite, a norm within limits."""
        # The order's artifact gives the keep rate, after a restart too.
        rate = self._rates[order.artifact.digest]
        chosen = self._submodel(self._drawn_for(result.device), rate, order.round)
        update = read_payload(self.task, order, result, "update")
        admit.weights(update, self._shapes(state.weights, chosen), self._norm)
        return SubmodelUpdate(update, chosen)

    def aggregate(
        self,
        state: GlobalModel,
        round_: int,
        results: Sequence[Result],
        contributions: Iterable[SubmodelUpdate],
    ) -> tuple[GlobalModel, Metrics]:
        """Add each update at the units of its sub-model, one by one; see `models.average`."""
        samples = global_model.counted(self.task, results)  # n_k
        absent = self.task.config.submodel.absent
        average = Average(state.weights, self._layout, samples_total=sum(samples), absent=absent)
        devices = {}
        for result, n_k, update in zip(results, samples, contributions, strict=True):
            average.add(update.tensors, update.submodel.units, n_k)
            devices[result.device] = {"keep_rate": update.submodel.keep_rate}
            self.task.progress("aggregate", len(devices), len(results))
        after = global_model.after(self.task, state, average.total(), results)
        return after, {**global_model.scores(self.task, after, round_), "devices": devices}

    def _drawn_for(self, name: str) -> str:
        """The device's name if its units are its own; "" if all with its keep rate share them."""
        return name if self.task.config.submodel.units == "random" else ""

    def _drawn(self, name: str, rate: float, round_: int) -> Submodel:
        """The sub-model for a keep rate and round; `name` is what `_drawn_for` returns."""
        if rate == 1:
            return Submodel(rate)
        config = self.task.config
        units = submodel.choose(
            self._layout,
            rate,
            config.submodel.units,
            seed=config.seed,
            round_=round_,
            device=name,
        )
        return Submodel(rate, units, submodel.digest(units))

    def _cut(self, weights: Weights, chosen: Submodel) -> Weights:
        """The weights of a sub-model, w[units]."""
        return (
            weights if chosen.units is None else submodel.cut(weights, self._layout, chosen.units)
        )

    def _shapes(self, weights: Weights, chosen: Submodel) -> dict[str, tuple[int, ...]]:
        """The shapes of a sub-model's weights."""
        if chosen.units is None:
            return shapes(weights)
        at = all_places(self._layout, chosen.units)
        return {
            name: (*map(len, at[name]), *shape[len(at[name]) :])
            for name, shape in self._layout.shapes.items()
        }
