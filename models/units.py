"""Index sets of Federated Dropout: the units that a sub-model keeps, and its tensors.

Caldas et al. 2018 (arXiv 1812.07210): every hidden layer keeps a fixed number of its n units,
k = max(1, round(p * n)) at keep rate p, drawn without replacement. The weight matrices that remain
are dense and smaller. Here a *unit* is a neuron of a hidden linear layer or a filter
of a hidden convolution, with all that belongs to it: its bias and normalization, its inputs to the
next layers, and the channels that a skip connection adds to it. A *group* is a set of units that
are drawn from together, most often a layer's. All of this is arithmetic on numpy arrays;
`models.submodel` finds the groups of a network.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wire import records, seeds
from wire.errors import StillhouseError

Array = NDArray[Any]
Axis = NDArray[np.int64]
"""The unit that each index along an axis belongs to; -1: it belongs to none and is always kept.

Units are numbered through all groups of a layout, in the order of `Layout.groups`.
"""

Units = Mapping[str, NDArray[np.int64]]
"""The kept units of each group: indices from 0 to the group's width, ascending."""

Places = tuple[NDArray[np.int64], ...]
"""Indices along each axis of a whole tensor: `whole[np.ix_(*places)]` is the sub-model's.

They end with the last axis that is cut; later axes are whole. A tensor that is whole has no places,
and `whole[np.ix_()]` is all of it.
"""

How = Literal["random", "shared", "ordered", "rolling"]


@dataclass(frozen=True, eq=False)
class Layout:
    """The units that the indices of a network's tensors belong to.

    Attributes:
        groups: name (of the first layer that makes the units, such as "conv1") -> width, 2 or more.
        axes: state_dict name (of parameters and floating-point buffers) -> by axis; None: whole.
        shapes: state_dict name -> shape in the whole model.
    """

    groups: Mapping[str, int]
    axes: Mapping[str, tuple[Axis | None, ...]]
    shapes: Mapping[str, tuple[int, ...]]


def kept_widths(layout: Layout, keep_rate: float) -> dict[str, int]:
    """The number of units that each group keeps: k = max(1, round(p * n)).

    Raises:
        StillhouseError: the keep rate is not in (0, 1].
    """
    if not 0 < keep_rate <= 1:
        raise StillhouseError(
            f"keep_rate: expected more than 0 and at most 1 (1 keeps all), got {keep_rate}"
        )
    return {name: max(1, round(keep_rate * width)) for name, width in layout.groups.items()}


def choose(
    layout: Layout, keep_rate: float, how: How, *, seed: int, round_: int, device: str
) -> dict[str, NDArray[np.int64]]:
    """The units that a device keeps in a round.

    Args:
        layout: the whole model's.
        keep_rate: p, in (0, 1].
        how: "random" draws anew for each device and round (Caldas et al. 2018); "shared" draws once
            a round, the same for all devices; "ordered" takes the first k (HeteroFL, Diao et al.
            2020, arXiv 2010.01264; FjORD, Horvath et al. 2021, arXiv 2102.13451); "rolling" a
            window of k that starts at the round's number and wraps around (FedRolex, Alam et al.
            2022, arXiv 2212.01548), so that n rounds train each of n units k times.
        seed: the run's.
        round_: number of the round.
        device: name of the device.

    Raises:
        StillhouseError: the keep rate is not in (0, 1].
    """
    chosen = {}
    for name, k in kept_widths(layout, keep_rate).items():
        n = layout.groups[name]
        if how == "ordered":
            order = np.arange(n)
        elif how == "rolling":
            order = (round_ + np.arange(n)) % n
        else:
            # Sorting n uniform 64-bit integers shuffles; the first k are a draw without replacement
            # (a tie, which would favour the lower index, has odds of n^2 / 2^65).
            drawn_for = device if how == "random" else None
            text = json.dumps(["sub-model", seed, round_, drawn_for, name])
            key = hashlib.sha256(text.encode()).digest()
            first, second = (int.from_bytes(key[at : at + 8], "little") for at in (0, 8))
            order = seeds.raw(first, second, n).argsort(kind="stable")
        chosen[name] = np.sort(order[:k]).astype(np.int64)
    return chosen


def digest(units: Units) -> str:
    """SHA-256, in hexadecimal, of the index set's canonical JSON; equal sets have equal digests."""
    plain = {name: indices.tolist() for name, indices in units.items()}
    return hashlib.sha256(records.canonical(plain)).hexdigest()


def all_places(layout: Layout, units: Units) -> dict[str, Places]:
    """The place of each of a sub-model's tensors in the whole one; see `Places`."""
    # Whether each unit stays, by its number; the last entry, which index -1 finds, is true.
    marks = np.zeros(sum(layout.groups.values()) + 1, bool)
    marks[-1] = True
    first = 0
    for name, width in layout.groups.items():
        marks[first + units[name]] = True
        first += width
    return {name: _places(axes, layout.shapes[name], marks) for name, axes in layout.axes.items()}


def cut(state: Mapping[str, Array], layout: Layout, units: Units) -> dict[str, Array]:
    """The tensors of the sub-model, dense: contiguous copies in the dtype that they have."""
    at = all_places(layout, units)
    return {name: tensor[np.ix_(*at[name])].copy() for name, tensor in state.items()}


def shapes_of(layout: Layout, units: Units) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that `cut` returns."""
    at = all_places(layout, units)
    return {
        name: (*map(len, at[name]), *shape[len(at[name]) :])
        for name, shape in layout.shapes.items()
    }


def paste(
    state: Mapping[str, Array], part: Mapping[str, Array], layout: Layout, units: Units
) -> dict[str, Array]:
    """A copy of the whole model's tensors with those of a sub-model put back where they were."""
    at = all_places(layout, units)
    whole = {name: tensor.copy() for name, tensor in state.items()}
    for name, tensor in part.items():
        whole[name][np.ix_(*at[name])] = tensor
    return whole


def _places(
    axes: tuple[Axis | None, ...], shape: tuple[int, ...], marks: NDArray[np.bool_]
) -> Places:
    cuts = max((i for i, axis in enumerate(axes, 1) if axis is not None), default=0)
    return tuple(
        np.arange(length) if axis is None else np.flatnonzero(marks[axis])
        for axis, length in zip(axes[:cuts], shape[:cuts], strict=True)
    )
