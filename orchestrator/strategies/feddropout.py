"""Federated Dropout (Caldas et al. 2018): each device trains a sub-model of the global model.

    server: cut w_k = w[units_k], encode -> device: decode, train, encode the update
    server: decode, paste by units_k, average

The keep rate p of a device follows from its tier, so that small and large devices serve in one
run; which units it keeps in a round from `submodel.units`. Lossy codecs act in both directions.
At p = 1 this is FedAvg, bit for bit.
"""

from collections.abc import Mapping

import models
from models import submodel
from models.average import Average
from models.units import all_places
from orchestrator.strategies.fedavg import FedAvg, Share
from orchestrator.strategies.strategy import Array, Task
from wire.messages import Birth, Order


class FedDropout(FedAvg):
    """`Task.config.submodel` says what is cut; units follow from seed, round and device alone.

    Raises:
        StillhouseError: the model's channels cannot be followed; the message names the module.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        device = task.config.device
        model = models.build(device.network, classes=device.class_count, input_shape=device.input)
        self.layout = submodel.layout(model, device.input)
        self._rates = {v.artifact.digest: r.keep_rate for r, v in task.variants.items()}

    def share(self, name: str, birth: Birth, round_: int) -> Share:
        """By the device's tier."""
        rate = self.task.config.submodel.rate_of(name, birth.platform.memory_bytes)
        return self._share(name, rate, round_)

    def share_of(self, order: Order, name: str) -> Share:
        """The artifact of an order tells the keep rate, also after a restart."""
        return self._share(name, self._rates[order.artifact.digest], order.round)

    def _share(self, name: str, rate: float, round_: int) -> Share:
        if rate == 1:
            return Share()
        config = self.task.config
        units = submodel.choose(
            self.layout,
            rate,
            config.submodel.units,
            seed=config.seed,
            round_=round_,
            device=name,
        )
        return Share(rate, units, submodel.digest(units))

    def cut(self, weights: Mapping[str, Array], share: Share) -> Mapping[str, Array]:
        """The sub-model's weights."""
        return weights if share.units is None else submodel.cut(weights, self.layout, share.units)

    def shapes(self, share: Share) -> dict[str, tuple[int, ...]]:
        """Of the sub-model's weights."""
        if share.units is None:
            return super().shapes(share)
        at = all_places(self.layout, share.units)
        return {
            name: (*map(len, at[name]), *shape[len(at[name]) :])
            for name, shape in self.layout.shapes.items()
        }

    def average(self, weights: Mapping[str, Array], samples: int) -> Average:
        """By the configured meaning of an absent unit."""
        absent = self.task.config.submodel.absent
        return Average(weights, self.layout, samples_total=samples, absent=absent)
