"""Labels on the axes of tensors, and the units that they form.

Every index along every axis of a network's parameters and floating-point buffers gets a number, its
*label*; label 0 marks what must stay. Activations take the labels of the weights that made them. To
*tie* two labels is to say that they belong to one unit: keep both or drop both. Ties are edges of a
graph over labels, and a unit is one of its connected components.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Labels = NDArray[np.int64]
Axes = tuple[Labels, ...]


class Ties:
    """The labels and ties that have been seen so far, while a network runs.

    Args:
        named: parameters and floating-point buffers by name; a tensor may have several names.

    Attributes:
        made: axes along which layers made their outputs, in the order in which they ran.
    """

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.named = named
        self.made: list[Labels] = []
        self._axes = WeakTensorKeyDictionary()  # by identity; activations are freed as ever
        self._edges: list[tuple[Labels, Labels]] = []
        self._firsts = [0]
        self._owners = [""]
        self._next = 1
        for name, tensor in named.items():
            if tensor not in self._axes:
                self._axes[tensor] = tuple(self._fresh(name, length) for length in tensor.shape)

    def axes(self, tensor: Tensor) -> Axes:
        """Labels along each axis; those of a tensor without labels are 0."""
        if tensor in self._axes:
            axes: Axes = self._axes[tensor]
            return axes
        return tuple(stay(length) for length in tensor.shape)

    def label(self, tensor: Tensor, axes: Axes) -> None:
        """Give an activation its labels."""
        self._axes[tensor] = axes

    def tie(self, a: Labels, b: Labels) -> None:
        """Say that `a` and `b`, index by index, are the same units; they broadcast."""
        left, right = np.broadcast_arrays(a, b)
        self._edges.append((left.ravel(), right.ravel()))

    def whole(self, *axes: Labels) -> None:
        """Say that all of these labels must stay."""
        for labels in axes:
            self.tie(labels, stay(1))

    def owner(self, labels: Labels) -> str:
        """The tensor that the least of these labels, 0 aside, was made for."""
        at = np.searchsorted(self._firsts, labels[labels > 0].min(), "right")
        return self._owners[int(at) - 1]

    def units(self) -> Labels:
        """The unit of each label, named by the least label in it; unit 0 must stay.

        Each pass hooks every component to its least neighbour and then points all labels at their
        component's least. It takes about log2 of the longest chain of ties passes.
        """
        a = np.concatenate([stay(0), *(a for a, _ in self._edges)])
        b = np.concatenate([stay(0), *(b for _, b in self._edges)])
        unit = np.arange(self._next)
        while (unit[a] != unit[b]).any():
            at_a, at_b = unit[a], unit[b]
            np.minimum.at(unit, at_a, at_b)
            np.minimum.at(unit, at_b, at_a)
            while (unit[unit] != unit).any():
                unit = unit[unit]
        return unit

    def _fresh(self, name: str, length: int) -> Labels:
        self._firsts.append(self._next)
        self._owners.append(name)
        self._next += length
        return np.arange(self._next - length, self._next)


def stay(length: int) -> Labels:
    """The labels of an axis that must stay whole."""
    return np.zeros(length, np.int64)
