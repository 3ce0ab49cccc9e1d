"""Averages of devices' updates, added one by one, and of whole networks.

`Average` adds up the updates of devices that may have trained different sub-models. Here w are the
whole model's tensors, and d_k is the update of device k: placed at its sub-model's coordinates, and
zero elsewhere. n_k is the device's number of samples, limited by `counted`, and N = sum_k n_k:

    zero      w + sum_k (n_k / N) d_k                                   at every coordinate
    holders   w + sum_k n_k d_k / sum_{k holds} n_k                     a coordinate nobody holds: w

"zero" is the rule of Caldas et al. 2018 (arXiv 1812.07210): FedAvg in which an absent coordinate
counts as an update of zero. If each device draws units of its own at keep rate p, a coordinate then
moves on average p times (p^2 between two hidden layers) as far as its holders would move it.
"holders" is the rule of HeteroFL (Diao et al. 2020, arXiv 2010.01264), weighted by samples. Without
sub-models both are FedAvg (McMahan et al. 2017, arXiv 1602.05629), bit for bit.

Memory: one float64 copy of the model, and for "holders" also a count of samples for each
coordinate. It does not grow with the number of devices, apart from what the caller holds.

`mean` is the mean of networks, sum_k n_k w_k / sum_k n_k.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from models.units import Array, Layout, Places, Units, all_places

Absent = Literal["zero", "holders"]


def counted(samples: Sequence[int], max_weight: float) -> list[int]:
    """n_k of each device: its samples, but at most `max_weight` times the median of all devices.

    The limit is there because nobody can check the number that a device reports. It is rounded
    down; the median of an even number of devices is the lower of the middle two.
    """
    limit = int(max_weight * statistics.median_low(samples))
    return [min(n, limit) for n in samples]


def mean(networks: Sequence[Mapping[str, Array]], samples: Sequence[int]) -> dict[str, Array]:
    """The float32 mean of networks with the same tensors, weighted by `samples`; float64 sums."""
    return {
        name: np.average([each[name] for each in networks], axis=0, weights=samples).astype(
            np.float32
        )
        for name in networks[0]
    }


class Average:
    """An accumulator of one round; see the module's docstring.

    Args:
        state: w, the whole model's tensors, float32; held by reference until `total`.
        layout: the whole model's layout; None if no sub-models are trained.
        samples_total: N, the sum of n_k over all updates that will be added.
        absent: the rule for coordinates that a device does not hold: "zero" or "holders".
    """

    def __init__(
        self,
        state: Mapping[str, Array],
        layout: Layout | None,
        *,
        samples_total: int,
        absent: Absent = "zero",
    ) -> None:
        self._state = state
        self._layout = layout
        self._samples_total = samples_total
        self._sum = {name: np.array(tensor, np.float64) for name, tensor in state.items()}
        self._held: dict[str, Array] = {}
        if absent == "holders":
            # All coordinates along the axes after the last cut axis have the same holders.
            widths = layout.groups if layout else {}
            everyone = self._at({name: np.arange(width) for name, width in widths.items()})
            self._held = {
                name: np.zeros([len(indices) for indices in everyone.get(name, ())], np.int64)
                for name in state
            }

    def add(self, update: Mapping[str, Array], units: Units | None, samples: int) -> None:
        """Add one device's update.

        Args:
            update: the sub-model's tensors after training minus those before, float32.
            units: the units of its sub-model; None for the whole model.
            samples: n_k.
        """
        at = {} if units is None else self._at(units)
        for name, delta in update.items():
            index = np.ix_(*at.get(name, ()))
            self._sum[name][index] += (samples / self._samples_total) * delta
            if self._held:
                self._held[name][index] += samples

    def _at(self, units: Units) -> dict[str, Places]:
        return all_places(self._layout, units) if self._layout else {}

    def total(self) -> dict[str, Array]:
        """The next state, in the dtypes of `state`."""
        result = {}
        for name, before in self._state.items():
            after = self._sum[name]
            if self._held:
                # `after` is w + sum_k (n_k / N) d_k. If all devices hold a coordinate, this is the
                # mean already, and scaling by N / N would round it.
                held = self._held[name]
                held = held.reshape(held.shape + (1,) * (before.ndim - held.ndim))
                some = (held > 0) & (held < self._samples_total)
                scale = self._samples_total / np.where(some, held, self._samples_total)
                after = np.where(some, before + scale * (after - before), after)
            result[name] = after.astype(before.dtype)
        return result
