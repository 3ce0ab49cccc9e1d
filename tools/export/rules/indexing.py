"""Look-ups by integer tensors, constant or computed, and the writes that are their gradients.

Gradients add with `ScatterElements`, which ONNX Runtime's CPU provider runs in order: what is
looked up several times gets the sum, the same at every run. (`ScatterND` adds in parallel.)
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec
from tools.export.rules.elementwise import add, mul
from tools.export.rules.layout import reshape, slice_, transpose
from tools.export.rules.reduction import reduce
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten
Indices = Sequence[Value | None]


def _take(g: Graph, a: Value, places: Value, axis: int) -> Value:
    """The slices of a at the places, whose shape replaces the axis."""
    shape = (*a.shape[:axis], *places.shape, *a.shape[axis + 1 :])
    return g.node("Gather", a, places, shape=shape, dtype=a.dtype, axis=axis)


@rule(aten.embedding.default)
def _embedding(g: Graph, out: Spec, weight: Value, places: Value, *_: Any) -> Value:
    return _take(g, weight, places, 0)


@rule(aten.index_select.default)
def _index_select(g: Graph, out: Spec, a: Value, axis: int, places: Value) -> Value:
    return reshape(g, _take(g, a, places, axis % len(a.shape)), out.shape)


class _Joined:
    """Indices of several axes as one index of one axis, as numpy's advanced indexing joins them.

    Attributes:
        order: the axes of the tensor, the indexed ones side by side: where they are if they are
            neighbours, in front otherwise.
        axis: the place of the joined axis.
        shape: of the tensor with its axes in that order and the indexed ones joined.
        places: the joined index, of the indices' common shape.
    """

    def __init__(self, g: Graph, a: Value, indices: Indices) -> None:
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
        self.places = _positive(g, chosen[axes[0]], lengths[0])
        for axis, length in zip(axes[1:], lengths[1:], strict=True):
            self.places = add(g, mul(g, self.places, length), _positive(g, chosen[axis], length))


def _positive(g: Graph, index: Value, length: int) -> Value:
    """The index with the negative ones, which count from the end, as positive ones."""
    zero = g.constant(0, index.dtype)
    negative = g.node("Less", index, zero, shape=index.shape, dtype=torch.bool)
    turned = add(g, index, length)
    return g.node("Where", negative, turned, index, shape=index.shape, dtype=index.dtype)


@rule(aten.index.Tensor)
def _index(g: Graph, out: Spec, a: Value, indices: Indices) -> Value:
    joined = _Joined(g, a, indices)
    flat = reshape(g, transpose(g, a, joined.order), joined.shape)
    return _take(g, flat, joined.places, joined.axis)


@rule(aten.index_put.default, aten._unsafe_index_put.default)  # noqa: SLF001
def _index_put(
    g: Graph, out: Spec, a: Value, indices: Indices, source: Value, accumulate: bool = False
) -> Value:
    joined = _Joined(g, a, indices)
    moved = transpose(g, a, joined.order)
    before, after = joined.shape[: joined.axis], joined.shape[joined.axis + 1 :]
    count = math.prod(joined.places.shape)
    wide = g.expand(source, (*before, *joined.places.shape, *after))
    updates = reshape(g, wide, (*before, count, *after))
    places = reshape(g, joined.places, (count, *(1 for _ in after)))
    flat = _scatter(
        g, reshape(g, moved, joined.shape), g.expand(places, updates.shape), updates, joined.axis,
        "add" if accumulate else "none",
    )  # fmt: skip
    back = [joined.order.index(axis) for axis in range(len(joined.order))]
    return transpose(g, reshape(g, flat, moved.shape), back)


def _scatter(g: Graph, a: Value, places: Value, updates: Value, axis: int, reduction: str) -> Value:
    return g.node(
        "ScatterElements", a, places, updates, shape=a.shape, dtype=a.dtype, axis=axis,
        reduction=reduction,
    )  # fmt: skip


@rule(aten.gather.default)
def _gather(g: Graph, out: Spec, a: Value, axis: int, places: Value, **_: Any) -> Value:
    axis %= len(a.shape)
    return g.node("GatherElements", a, places, shape=out.shape, dtype=a.dtype, axis=axis)


@rule(aten.scatter.src)
def _scatter_source(
    g: Graph, out: Spec, a: Value, axis: int, places: Value, source: Value
) -> Value:
    return _scatter(g, a, places, _like(g, source, places), axis % len(a.shape), "none")


@rule(aten.scatter.value)
def _scatter_value(g: Graph, out: Spec, a: Value, axis: int, places: Value, number: float) -> Value:
    updates = g.expand(g.constant(number, a.dtype), places.shape)
    return _scatter(g, a, places, updates, axis % len(a.shape), "none")


@rule(aten.scatter_add.default)
def _scatter_add(g: Graph, out: Spec, a: Value, axis: int, places: Value, source: Value) -> Value:
    return _scatter(g, a, places, _like(g, source, places), axis % len(a.shape), "add")


def _like(g: Graph, source: Value, places: Value) -> Value:
    """The part of the source that the places speak of."""
    axes = list(range(len(places.shape)))
    ones = [1] * len(axes)
    return slice_(g, source, axes, [0] * len(axes), places.shape, ones)


def _extreme(op: str, *operators: Any) -> None:
    def lower(
        g: Graph, out: tuple[Spec, ...], a: Value, axis: int, keep: bool = False
    ) -> tuple[Value, Value]:
        axis %= len(a.shape)
        places = g.node(
            f"Arg{op}", a, shape=out[1].shape, dtype=torch.int64, axis=axis, keepdims=int(keep)
        )
        return reduce(g, f"Reduce{op}", a, [axis], keep=keep), places

    rule(*operators)(lower)


_extreme("Max", aten.max.dim)
_extreme("Min", aten.min.dim)
