"""Averages of devices' updates that a few hostile devices cannot move far.

    median         at each coordinate, the median (Yin et al. 2018, arXiv 1803.01498, definition 1)
    trimmed_mean   at each coordinate, the mean without the f lowest and the f highest values,
                   f = floor(beta n) (definition 2 there)
    multi_krum     the mean of n - f whole updates: those with the smallest sum of squared distances
                   to their n - f - 2 nearest ones (Blanchard et al. 2017, arXiv 1703.02757,
                   section 4)

beta is the share of devices that may be hostile, n the number of devices. Krum needs n >= 2 f + 3;
of fewer devices it withstands as many as fit. The three rules count all devices alike, because a
hostile one may claim any number of samples. Over sub-models they are rules over the devices that
hold a coordinate ("holders" of `models.average`): of 2 f values or fewer, the middle one or two are
left. A coordinate that nobody holds stays.

Before any rule, clipping scales down each tensor of an update whose root mean square is above
`clip` times the median device's. It goes tensor by tensor, because batch norm's running variances
are far longer than all else. For the same reason Krum divides each tensor by that median first.
With rule "mean" clipping is all there is: the average is that of `models.average`.

Memory: all updates of the round at once, and while a tensor is joined some 4 n times its float32
size, for Krum 11 n times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from models.average import Absent, Average
from models.units import Array, Layout, Places, Units, all_places

Rule = Literal["mean", "median", "trimmed_mean", "multi_krum"]
TINY = 1e-30  # below any root mean square of an update that moves float32 weights


@dataclass(frozen=True)
class Device:
    """One device's update, with the units of its sub-model and its number of samples n_k."""

    update: Mapping[str, Array]
    units: Units | None
    samples: int


class RobustAverage:
    """An accumulator of one round, as `Average` is; see the module's docstring.

    Args:
        state: w, the whole model's tensors, float32.
        layout: the whole model's layout; None if no sub-models are trained.
        rule: how updates are joined.
        hostile: beta, 0 <= beta < 0.5.
        clip: most root mean square of a tensor's update, in medians; 0: any.
        absent: for rule "mean", see `Average`.

    Attributes:
        distances: after `total`, of each device in the order of `add`: how far its update is from
            the average, divided by the median device's distance.
    """

    def __init__(
        self,
        state: Mapping[str, Array],
        layout: Layout | None,
        *,
        rule: Rule,
        hostile: float,
        clip: float,
        absent: Absent = "zero",
    ) -> None:
        self._state, self._layout, self._absent = state, layout, absent
        self._rule, self._hostile, self._clip = rule, hostile, clip
        self._devices: list[Device] = []
        self.distances: list[float] = []

    def add(self, update: Mapping[str, Array], units: Units | None, samples: int) -> None:
        """Add one device's update; the arguments are those of `Average.add`."""
        self._devices.append(Device(update, units, samples))

    def total(self) -> dict[str, Array]:
        """The next state, in the dtypes of `state`; there must be an update."""
        lengths = {name: self._lengths(name) for name in self._state}
        if self._clip:
            self._devices = [
                Device(
                    {
                        name: _shortened(array, lengths[name], k, self._clip)
                        for name, array in device.update.items()
                    },
                    device.units,
                    device.samples,
                )
                for k, device in enumerate(self._devices)
            ]
        if self._rule == "mean":
            after = self._mean(self._devices, self._absent)
        elif self._rule == "multi_krum":
            chosen = self._nearest(lengths)
            equal = [Device(self._devices[k].update, self._devices[k].units, 1) for k in chosen]
            after = self._mean(equal, "holders")
        else:
            after = {
                name: (before + self._middle(name)).astype(before.dtype)
                for name, before in self._state.items()
            }
        self.distances = self._distances(after, lengths)
        return after

    def _mean(self, devices: Sequence[Device], absent: Absent) -> dict[str, Array]:
        samples = sum(device.samples for device in devices)
        average = Average(self._state, self._layout, samples_total=samples, absent=absent)
        for device in devices:
            average.add(device.update, device.units, device.samples)
        return average.total()

    def _lengths(self, name: str) -> Array:
        """The root mean square of each device's update of a tensor: (n,) float64."""
        updates = (device.update[name].astype(np.float64) for device in self._devices)
        return np.array([np.sqrt(np.square(update).mean()) for update in updates])

    def _rows(self, name: str) -> Array:
        """All updates of a tensor, (n, *shape) float32; NaN where a device holds no coordinate."""
        whole = np.full((len(self._devices), *self._state[name].shape), np.nan, np.float32)
        for k, device in enumerate(self._devices):
            index: Any = (k, *np.ix_(*self._places(device.units, name)))
            whole[index] = device.update[name]
        return whole

    def _places(self, units: Units | None, name: str) -> Places:
        if self._layout is None or units is None:
            return ()
        return all_places(self._layout, units).get(name, ())

    def _middle(self, name: str) -> Array:
        """The median or the trimmed mean of each coordinate; 0 where nobody holds it."""
        rows = np.sort(self._rows(name), axis=0)  # NaN comes last
        held = np.isfinite(rows).sum(axis=0)
        trimmed = np.maximum(held - 1, 0) // 2  # leaves the middle one, or the middle two
        if self._rule == "trimmed_mean":
            trimmed = np.minimum(trimmed, int(self._hostile * len(rows)))
        ranks = np.arange(len(rows)).reshape(-1, *[1] * held.ndim)
        kept = (ranks >= trimmed) & (ranks < held - trimmed)
        total = np.where(kept, rows, 0).sum(axis=0, dtype=np.float64)
        middle: Array = total / np.maximum(kept.sum(axis=0), 1)
        return middle

    def _nearest(self, lengths: Mapping[str, Array]) -> list[int]:
        """The devices whose updates multi-Krum keeps."""
        n = len(self._devices)
        hostile = max(min(int(self._hostile * n), (n - 3) // 2), 0)
        if not hostile:
            return list(range(n))
        apart, shared = np.zeros((n, n)), np.zeros((n, n))
        for name in self._state:
            rows = self._rows(name).reshape(n, -1).astype(np.float64)
            holds = np.isfinite(rows).astype(np.float64)
            values = np.where(holds > 0, rows, 0) / _unit(lengths[name])
            squares = np.square(values) @ holds.T
            apart += squares + squares.T - 2 * (values @ values.T)
            shared += holds @ holds.T
        # Devices that share no coordinate say nothing about one another.
        distances = np.where(shared > 0, apart / np.maximum(shared, 1), np.inf)
        np.fill_diagonal(distances, np.inf)
        scores = np.sort(distances, axis=1)[:, : n - hostile - 2].sum(axis=1)
        return sorted(np.argsort(scores, kind="stable")[: n - hostile].tolist())

    def _distances(self, after: Mapping[str, Array], lengths: Mapping[str, Array]) -> list[float]:
        apart, sizes = np.zeros(len(self._devices)), np.zeros(len(self._devices))
        for name, before in self._state.items():
            moved = after[name].astype(np.float64) - before
            for k, device in enumerate(self._devices):
                update = device.update[name]
                there = moved[np.ix_(*self._places(device.units, name))]
                apart[k] += np.square((update - there) / _unit(lengths[name])).sum()
                sizes[k] += update.size
        each = np.sqrt(apart / np.maximum(sizes, 1))
        found: list[float] = (each / max(float(np.median(each)), TINY)).tolist()
        return found


def join(
    networks: Sequence[Mapping[str, Array]],
    samples: Sequence[int],
    *,
    rule: Rule,
    hostile: float,
    clip: float,
) -> dict[str, Array]:
    """The robust average of whole networks with the same tensors.

    What the rules see are the differences from the median network.
    """
    middle = {
        name: np.array(np.median([each[name] for each in networks], axis=0), np.float32)
        for name in networks[0]
    }
    average = RobustAverage(middle, None, rule=rule, hostile=hostile, clip=clip)
    for network, n_k in zip(networks, samples, strict=True):
        average.add({name: network[name] - middle[name] for name in middle}, None, n_k)
    return average.total()


def _unit(lengths: Array) -> float:
    """What a tensor's values are divided by, so that those of all tensors can be compared."""
    return max(float(np.median(lengths)), TINY)


def _shortened(array: Array, lengths: Array, k: int, clip: float) -> Array:
    """Device k's update of a tensor, at most `clip` times as long as the median one."""
    limit = clip * float(np.median(lengths))
    return array if lengths[k] <= limit else (array * (limit / lengths[k])).astype(array.dtype)
