"""Averages of what devices trained: of updates as they come, and of whole networks.

`Average` adds up the updates of devices that may have trained different sub-models.

With w the whole model's tensors, d_k the update of device k put where its sub-model lies and zero
elsewhere, n_k its samples and N those of all:

    zero      w + sum_k (n_k / N) d_k                                   at every coordinate
    holders   w + sum_k n_k d_k / sum_{k holds} n_k                     a coordinate nobody holds: w

The first is Caldas et al. 2018 (arXiv 1812.07210): FedAvg, to which an absent coordinate is an
update of zero, so that at keep rate p a coordinate moves p times (p^2 between two hidden layers) as
far as its holders would move it. The second is that of HeteroFL (Diao et al. 2020, arXiv
2010.01264), with samples for weights. Without sub-models both are FedAvg (McMahan et al. 2016,
arXiv 1602.05629), bit for bit.

Memory: one float64 copy of the model, with "holders" a count of samples for each coordinate as
well, and whatever the caller holds; nothing grows with the number of devices.

`mean` is the mean of networks, sum_k n_k w_k / sum_k n_k. In both, n_k is what `counted` says.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from models.units import Array, Layout, Places, Units, all_places

Absent = Literal["zero", "holders"]


def counted(samples: Sequence[int], max_weight: float) -> list[int]:
    """n_k of each device: its samples, but at most `max_weight` times those of the median device.

    Nobody can check how many samples a device says to have. The limit is rounded down; the median
    of an even number of devices is the lower of the middle two.
    """
    limit = int(max_weight * statistics.median_low(samples))
    return [min(n, limit) for n in samples]


def mean(networks: Sequence[Mapping[str, Array]], samples: Sequence[int]) -> dict[str, Array]:
    """The mean of networks with the same tensors, weighted by n_k; added in float64, as float32."""
    return {
        name: np.average([each[name] for each in networks], axis=0, weights=samples).astype(
            np.float32
        )
        for name in networks[0]
    }


class Average:
    """An accumulator of one round; see the module's docstring.

    Args:
        state: the whole model's tensors, float32; kept by reference until `total`.
        layout: of the whole model; None where no sub-models are trained.
        samples_total: N, of all updates that will be added.
        absent: what a coordinate that a device does not hold counts as.
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
        self._sum = {name: tensor.astype(np.float64) for name, tensor in state.items()}
        self._held: dict[str, Array] = {}
        if absent == "holders":
            # Along the axes after the last that is cut, all coordinates have the same holders.
            widths = layout.groups if layout else {}
            everyone = self._at({name: np.arange(width) for name, width in widths.items()})
            self._held = {
                name: np.zeros([len(indices) for indices in everyone.get(name, ())], np.int64)
                for name in state
            }

    def add(self, update: Mapping[str, Array], units: Units | None, samples: int) -> None:
        """Take in one device's update.

        Args:
            update: differences of the sub-model's tensors after and before training, float32.
            units: of its sub-model; None: the whole model.
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
        """The next state, in the dtypes of the last."""
        result = {}
        for name, before in self._state.items():
            after = self._sum[name]
            if self._held:
                # The sum is w + sum_k (n_k / N) d_k. Where all devices hold a coordinate that is
                # the mean, and to scale what was added by N / N would round it.
                held = self._held[name]
                held = held.reshape(held.shape + (1,) * (before.ndim - held.ndim))
                some = (held > 0) & (held < self._samples_total)
                scale = self._samples_total / np.where(some, held, self._samples_total)
                after = np.where(some, before + scale * (after - before), after)
            result[name] = after.astype(before.dtype)
        return result
