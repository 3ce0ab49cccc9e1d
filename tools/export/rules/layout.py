"""Operators that move values without changing them: views, slices, joins."""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


def concat(parts: Sequence[Value], axis: int) -> Value:
    """Join along an axis."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return parts[0].node("Concat", *parts[1:], shape=shape, axis=axis)


def slice_(
    a: Value,
    axes: Sequence[int],
    starts: Sequence[int],
    stops: Sequence[int],
    steps: Sequence[int],
) -> Value:
    """a[start:stop:step] on each of the axes; 0 <= start < stop <= length."""
    shape = list(a.shape)
    shorter = []
    for number, axis in enumerate(axes):
        length = len(range(starts[number], stops[number], steps[number]))
        if length != shape[axis]:
            shorter.append(number)
        shape[axis] = length
    if not shorter:
        return a
    bounds = [[values[n] for n in shorter] for values in (starts, stops, axes, steps)]
    return a.node("Slice", *map(a.graph.ints, bounds), shape=shape)


def slice_axis(a: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    """a[start:stop:step] on one axis."""
    return slice_(a, [axis], [start], [stop], [step])


def pad(a: Value, before: Sequence[int], after: Sequence[int], value: float = 0) -> Value:
    """Pad the last axes with a value; negative amounts crop."""
    free = len(a.shape) - len(before)
    if not any(before) and not any(after):
        return a
    shape = list(a.shape)
    for place in range(len(before)):
        shape[free + place] += before[place] + after[place]
    pads = [0] * free + list(before) + [0] * free + list(after)
    fill = a.graph.constant(value, a.dtype)
    return a.node("Pad", a.graph.ints(pads), fill, shape=shape)


def pad_axis(a: Value, axis: int, before: int, after: int) -> Value:
    """Zeros before and after along one axis; negative amounts crop."""
    rest = [0] * (len(a.shape) - axis - 1)
    return pad(a, [before, *rest], [after, *rest])


@rule(
    aten.view.default,
    aten.view_copy.default,
    aten._unsafe_view.default,  # noqa: SLF001
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.squeeze_copy.dim,
    aten.squeeze_copy.dims,
    aten.unsqueeze.default,
    aten.unsqueeze_copy.default,
)
def _view(g: Graph, out: Spec, a: Value, *_: Any) -> Value:
    return a.reshape(out.shape)


@rule(aten.permute.default, aten.permute_copy.default)
def _permute(g: Graph, out: Spec, a: Value, order: Sequence[int]) -> Value:
    return a.transpose([axis % len(a.shape) for axis in order])


@rule(aten.t.default, aten.t_copy.default)
def _matrix_transpose(g: Graph, out: Spec, a: Value) -> Value:
    maker = a.maker
    if maker is not None and maker.op in {"MatMul", "FusedMatMul"} and len(a.shape) == 2:
        # (b c)^T = c^T b^T: the product as it is needed, instead of a copy of a product
        left, right = a.sources
        return right.node(
            "FusedMatMul", left, shape=out.shape,
            transA=1 - maker.attribute("transB", 0), transB=1 - maker.attribute("transA", 0),
            alpha=maker.attribute("alpha", 1.0),
        )  # fmt: skip
    return a.transpose(list(reversed(range(len(a.shape)))))


@rule(aten.transpose.int, aten.transpose_copy.int, aten.transpose_.default)
def _swap(g: Graph, out: Spec, a: Value, first: int, second: int) -> Value:
    order = list(range(len(a.shape)))
    order[first], order[second] = order[second], order[first]
    return a.transpose(order)


@rule(aten.expand.default, aten.expand_copy.default)
def _expand(g: Graph, out: Spec, a: Value, *_: Any, **__: Any) -> Value:
    return a.expand(out.shape)


@rule(aten.repeat.default)
def _repeat(g: Graph, out: Spec, a: Value, repeats: Sequence[int]) -> Value:
    reshaped = a.reshape([1] * (len(repeats) - len(a.shape)) + list(a.shape))
    return reshaped.node("Tile", g.ints(repeats), shape=out.shape)


@rule(aten.cat.default)
def _cat(g: Graph, out: Spec, parts: Sequence[Value], axis: int = 0) -> Value:
    whole = [part for part in parts if part.shape != (0,)]
    return concat(whole, axis % len(out.shape))


def _bounds(length: int, start: int | None, stop: int | None) -> tuple[int, int]:
    first, last, _ = slice(start, stop).indices(length)
    return first, max(first, last)


@rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def _slice(
    g: Graph,
    out: Spec,
    a: Value,
    axis: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Value:
    axis %= len(a.shape)
    first, last = _bounds(a.shape[axis], start, stop)
    if axis == 0 and step == 1 and len(a.shape) == 2:
        return _rows(a, first, last)
    return slice_axis(a, axis, first, last, step)


def _rows(a: Value, first: int, last: int) -> Value:
    """Rows of a matrix; those of a product are the product of rows, and of a sum the sum."""
    maker = a.maker
    if maker is not None and maker.op == "Add":
        left, right = a.sources
        if left.shape == right.shape == a.shape:
            return _rows(left, first, last) + _rows(right, first, last)
    if maker is None or maker.op not in {"MatMul", "FusedMatMul"}:
        return slice_axis(a, 0, first, last)
    left, right = a.sources
    rows = slice_(left, [maker.attribute("transA", 0)], [first], [last], [1])
    shape = (last - first, a.shape[1])
    with a.graph.placed(maker.place):
        return rows.node(maker.op, right, shape=shape, **dict(maker.attributes))


@rule(aten.select.int, aten.select_copy.int)
def _select(g: Graph, out: Spec, a: Value, axis: int, index: int) -> Value:
    axis %= len(a.shape)
    index %= a.shape[axis]
    return slice_axis(a, axis, index, index + 1).reshape(out.shape)


@rule(aten.slice_scatter.default)
def _slice_scatter(
    g: Graph,
    out: Spec,
    a: Value,
    source: Value,
    axis: int = 0,
    start: int | None = None,
    stop: int | None = None,
    step: int = 1,
) -> Value:
    axis %= len(a.shape)
    first, last = _bounds(a.shape[axis], start, stop)
    if step != 1:
        return spaced(a, source, axis, first, step)
    parts = [source]
    if first > 0:
        parts.insert(0, slice_axis(a, axis, 0, first))
    if last < a.shape[axis]:
        parts.append(slice_axis(a, axis, last, a.shape[axis]))
    return concat(parts, axis)


def spaced(a: Value, source: Value, axis: int, first: int, step: int) -> Value:
    """`a` with the source on every step-th place from the first on."""
    length, count = a.shape[axis], source.shape[axis]
    before, after = a.shape[:axis], a.shape[axis + 1 :]
    apart = pad_axis(source.reshape((*before, count, 1, *after)), axis + 1, 0, step - 1)
    joined = apart.reshape((*before, count * step, *after))
    placed = pad_axis(joined, axis, first, length - first - count * step)
    if a.small == a.graph.constant(0.0, a.dtype):
        return placed
    chosen = [[place in range(first, first + count * step, step)] for place in range(length)]
    mask = a.graph.constant(chosen, torch.bool).reshape((length, *(1 for _ in after)))
    return mask.where(placed, a)


@rule(aten.select_scatter.default)
def _select_scatter(g: Graph, out: Spec, a: Value, source: Value, axis: int, index: int) -> Value:
    axis %= len(a.shape)
    index %= a.shape[axis]
    shape = list(a.shape)
    shape[axis] = 1
    return _slice_scatter(g, out, a, source.reshape(shape), axis, index, index + 1)


@rule(aten.split_with_sizes.default, aten.split_with_sizes_copy.default)
def _split(
    g: Graph, out: tuple[Spec, ...], a: Value, sizes: Sequence[int], axis: int = 0
) -> tuple[Value, ...]:
    axis %= len(a.shape)
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    return tuple(
        slice_axis(a, axis, end - size, end) for end, size in zip(ends, sizes, strict=True)
    )


@rule(aten.split.Tensor, aten.split_copy.Tensor)
def _split_even(
    g: Graph, out: tuple[Spec, ...], a: Value, size: int, axis: int = 0
) -> tuple[Value, ...]:
    return _split(g, out, a, [spec.shape[axis] for spec in out], axis)


@rule(aten.unbind.int, aten.unbind_copy.int)
def _unbind(g: Graph, out: tuple[Spec, ...], a: Value, axis: int = 0) -> tuple[Value, ...]:
    return tuple(_select(g, spec, a, axis, number) for number, spec in enumerate(out))


@rule(aten.roll.default)
def _roll(g: Graph, out: Spec, a: Value, shifts: Sequence[int], axes: Sequence[int] = ()) -> Value:
    if not axes:
        return _rolled(a.reshape((math.prod(a.shape),)), shifts[0], 0).reshape(out.shape)
    for shift, axis in zip(shifts, axes, strict=True):
        a = _rolled(a, shift, axis % len(a.shape))
    return a


def _rolled(a: Value, shift: int, axis: int) -> Value:
    length = a.shape[axis]
    cut = -shift % length
    if cut == 0:
        return a
    end = slice_axis(a, axis, cut, length)
    return concat([end, slice_axis(a, axis, 0, cut)], axis)


@rule(aten.constant_pad_nd.default)
def _constant_pad(g: Graph, out: Spec, a: Value, pads: Sequence[int], value: float = 0) -> Value:
    pairs = list(zip(pads[::2], pads[1::2], strict=True))[::-1]  # torch counts from the last axis
    return pad(a, [p[0] for p in pairs], [p[1] for p in pairs], value)


@rule(aten.flip.default)
def _flip(g: Graph, out: Spec, a: Value, axes: Sequence[int]) -> Value:
    return flip(a, [axis % len(a.shape) for axis in axes])


def flip(a: Value, axes: Sequence[int]) -> Value:
    """Reverse the order along the axes."""
    axes = [axis for axis in axes if a.shape[axis] > 1]
    if not axes:
        return a
    last = back = [-1] * len(axes)
    before_first = [-(2**62)] * len(axes)
    return a.node("Slice", *map(a.graph.ints, (last, before_first, axes, back)))


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(g: Graph, out: Spec, a: Value, factor: int) -> Value:
    return a.node("DepthToSpace", shape=out.shape, blocksize=factor, mode="CRD")


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(g: Graph, out: Spec, a: Value, factor: int) -> Value:
    batch, channels, height, width = a.shape
    split = (batch, channels, height // factor, factor, width // factor, factor)
    moved = a.reshape(split).transpose([0, 1, 3, 5, 2, 4])
    return moved.reshape(out.shape)


def enlarge(a: Value, factors: Sequence[int]) -> Value:
    """(N, C, H, W) with every value repeated by the factors along the last two axes.

    `Resize` does this in one vectorized pass; `Expand` over axes in between is far slower.
    """
    shape = (*a.shape[:2], a.shape[2] * factors[0], a.shape[3] * factors[1])
    if shape == a.shape:
        return a
    return a.node(
        "Resize", None, a.graph.constant([1.0, 1.0, *factors]), shape=shape, mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


@rule(aten.as_strided.default, aten.as_strided_copy.default)
def _as_strided(
    g: Graph,
    out: Spec,
    a: Value,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | None = None,
) -> Value:
    dense = [math.prod(size[place + 1 :]) for place in range(len(size))]
    if offset or list(stride) != dense or math.prod(size) != math.prod(a.shape):
        raise Unsupported(
            "a view by strides; use slices, avoid writing into a slice in place, and pad with "
            "torch.cat or 'reflect' instead of 'circular'"
        )
    return a.reshape(size)
