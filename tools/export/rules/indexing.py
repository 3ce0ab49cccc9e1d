"""Look-ups by integer tensors, constant or computed, and the writes that are their gradients.

Gradients add with `ScatterElements`. ONNX Runtime's CPU provider runs it in order, so that a value
that is looked up several times gets the same sum in every run. (`ScatterND` adds in parallel.)
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.layout import slice_
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten
Indices = Sequence[Value | None]


def _take(a: Value, places: Value, axis: int) -> Value:
    """The slices of a at the places, whose shape replaces the axis."""
    shape = (*a.shape[:axis], *places.shape, *a.shape[axis + 1 :])
    return a.node("Gather", places, shape=shape, axis=axis)


@rule(aten.embedding.default)
def _embedding(g: Graph, out: Spec, weight: Value, places: Value, *_: Any) -> Value:
    return _take(weight, places, 0)


@rule(aten.index_select.default)
def _index_select(g: Graph, out: Spec, a: Value, axis: int, places: Value) -> Value:
    return _take(a, places, axis % len(a.shape)).reshape(out.shape)


class _Joined:
    """Indices of several axes as one index of one axis, as numpy's advanced indexing joins them.

    Attributes:
        order: the axes of the tensor with the indexed ones side by side. They stay where they are
            if they are neighbours, and come first otherwise.
        axis: the number of the joined axis.
        shape: the tensor's shape with its axes in that order and the indexed ones joined.
        places: the joined index, of the indices' common shape.
    """

    def __init__(self, a: Value, indices: Indices) -> None:
        chosen = {axis: index for axis, index in enumerate(indices) if index is not None}
        if any(index.dtype == torch.bool for index in chosen.values()):
            raise Unsupported("a look-up by a mask, whose size depends on data; use torch.where")
        axes = list(chosen)
        self.axis = axes[0] if axes[-1] - axes[0] == len(axes) - 1 else 0
        free = [axis for axis in range(len(a.shape)) if axis not in chosen]
        self.order = [*free[: self.axis], *axes, *free[self.axis :]]
        lengths = [a.shape[axis] for axis in axes]
        apart = [a.shape[axis] for axis in self.order]
        after = apart[self.axis + len(axes) :]
        self.shape = (*apart[: self.axis], math.prod(lengths), *after)
        self.places = _positive(chosen[axes[0]], lengths[0])
        for axis, length in zip(axes[1:], lengths[1:], strict=True):
            self.places = self.places * length + _positive(chosen[axis], length)


def _positive(index: Value, length: int) -> Value:
    """An index where negative numbers, which count from the end, are positive ones."""
    return (index < 0).where(index + length, index)


@rule(aten.index.Tensor)
def _index(g: Graph, out: Spec, a: Value, indices: Indices) -> Value:
    joined = _Joined(a, indices)
    flat = a.transpose(joined.order).reshape(joined.shape)
    return _take(flat, joined.places, joined.axis)


@rule(aten.index_put.default, aten._unsafe_index_put.default)  # noqa: SLF001
def _index_put(
    g: Graph, out: Spec, a: Value, indices: Indices, source: Value, accumulate: bool = False
) -> Value:
    joined = _Joined(a, indices)
    moved = a.transpose(joined.order)
    before, after = joined.shape[: joined.axis], joined.shape[joined.axis + 1 :]
    count = math.prod(joined.places.shape)
    wide = source.expand((*before, *joined.places.shape, *after))
    updates = wide.reshape((*before, count, *after))
    places = joined.places.reshape((count, *(1 for _ in after)))
    flat = _scatter(
        moved.reshape(joined.shape), places.expand(updates.shape), updates, joined.axis,
        "add" if accumulate else "none",
    )  # fmt: skip
    back = [joined.order.index(axis) for axis in range(len(joined.order))]
    return flat.reshape(moved.shape).transpose(back)


def _scatter(a: Value, places: Value, updates: Value, axis: int, reduction: str) -> Value:
    return a.node("ScatterElements", places, updates, axis=axis, reduction=reduction)


@rule(aten.gather.default)
def _gather(g: Graph, out: Spec, a: Value, axis: int, places: Value, **_: Any) -> Value:
    axis %= len(a.shape)
    return a.node("GatherElements", places, shape=out.shape, axis=axis)


@rule(aten.scatter.src)
def _scatter_source(
    g: Graph, out: Spec, a: Value, axis: int, places: Value, source: Value
) -> Value:
    return _scatter(a, places, _like(source, places), axis % len(a.shape), "none")


@rule(aten.scatter.value)
def _scatter_value(g: Graph, out: Spec, a: Value, axis: int, places: Value, number: float) -> Value:
    updates = g.constant(number, a.dtype).expand(places.shape)
    return _scatter(a, places, updates, axis % len(a.shape), "none")


@rule(aten.scatter_add.default)
def _scatter_add(g: Graph, out: Spec, a: Value, axis: int, places: Value, source: Value) -> Value:
    return _scatter(a, places, _like(source, places), axis % len(a.shape), "add")


def _like(source: Value, places: Value) -> Value:
    """The part of the source that has the shape of the places."""
    axes = list(range(len(places.shape)))
    ones = [1] * len(axes)
    return slice_(source, axes, [0] * len(axes), places.shape, ones)


def _extreme(op: str, *operators: Any) -> None:
    def lower(
        g: Graph, out: tuple[Spec, ...], a: Value, axis: int, keep: bool = False
    ) -> tuple[Value, Value]:
        axis %= len(a.shape)
        places = a.node(
            f"Arg{op}", shape=out[1].shape, dtype=torch.int64, axis=axis, keepdims=int(keep)
        )
        return a.reduce(f"Reduce{op}", [axis], keep=keep), places

    rule(*operators)(lower)


_extreme("Max", aten.max.dim)
_extreme("Min", aten.min.dim)
