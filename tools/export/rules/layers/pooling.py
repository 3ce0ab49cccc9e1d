"""Max and average pooling over two or three axes, and their gradients.

Both gradients spread one number per window back over the window's taps. For windows that tile the
image this is an enlargement with a mask; in general it is a transposed convolution of each channel
by itself with a fixed kernel, which ONNX Runtime does without a scatter.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.layout import concat, enlarge, pad, slice_
from tools.export.rules.registry import Unsupported, rule
from tools.export.rules.resizing import averages, resized

aten: Any = torch.ops.aten
Ints = Sequence[int]


def _each(values: Ints | int | None, default: Ints, axes: int) -> list[int]:
    """One number an axis."""
    listed = [values] if isinstance(values, int) else list(values or default)
    return listed * axes if len(listed) == 1 else listed


def _batched(x: Value, axes: int) -> Value:
    return x if len(x.shape) == axes + 2 else x.reshape((1, *x.shape))


def _overhang(a: Ints, out: Ints, kernel: Ints, stride: Ints, padding: Ints, dil: Ints) -> Ints:
    """How far the last window reaches past the end (negative: how much it leaves out)."""
    return [
        (out[i] - 1) * stride[i] + dil[i] * (kernel[i] - 1) + 1 - a[i] - padding[i]
        for i in range(len(kernel))
    ]


def _largest(
    x: Value, places: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints,
    ceil_mode: bool,
) -> tuple[Value, ...]:  # fmt: skip
    """ONNX's max pooling of (N, C, *size): values, and their indices in all of x, flat."""
    past = _overhang(x.shape[2:], places, kernel, stride, padding, dilation)
    after = [max(0, n) for n in past] if ceil_mode else padding
    shape = (*x.shape[:2], *places)
    return x.graph.nodes(
        "MaxPool", x, outputs=[Spec(shape, x.dtype), Spec(shape, torch.int64)],
        kernel_shape=list(kernel), strides=list(stride), pads=[*padding, *after],
        dilations=list(dilation),
    )  # fmt: skip


def _planes(shape: Ints, size: Ints) -> Any:
    """The flat index of the first place of each plane of (N, C, *size), as (N, C, 1, ...)."""
    planes = np.arange(shape[0] * shape[1]) * math.prod(size)
    return planes.reshape(*shape[:2], *(1 for _ in size))


def _max_pool(
    axes: int, g: Graph, out: tuple[Spec, ...], x: Value, kernel: Ints, stride: Ints = (),
    padding: Ints | int = 0, dilation: Ints | int = 1, ceil_mode: bool = False,
) -> tuple[Value, ...]:  # fmt: skip
    kernel = _each(kernel, (), axes)
    stride, padding = _each(stride, kernel, axes), _each(padding, (), axes)
    image, dilation = _batched(x, axes), _each(dilation, (), axes)
    places = out[0].shape[-axes:]
    y, indices = _largest(image, places, kernel, stride, padding, dilation, ceil_mode)
    planes = g.constant(_planes(image.shape, image.shape[2:]), torch.int64)
    return y.reshape(out[0].shape), (indices - planes).reshape(out[0].shape)


def _max_pool_backward(
    axes: int, g: Graph, out: Spec, dy: Value, x: Value, kernel: Ints, stride: Ints, padding: Ints,
    dilation: Ints, ceil_mode: bool, _: Value,
) -> Value:  # fmt: skip
    kernel = _each(kernel, (), axes)
    stride, padding = _each(stride, kernel, axes), _each(padding, (), axes)
    dilation = _each(dilation, (), axes)
    image = _batched(x, axes)
    size, places = image.shape[2:], dy.shape[-axes:]
    # the forward pass's node again
    y, indices = _largest(image, places, kernel, stride, padding, dilation, ceil_mode)
    grad = dy.reshape(y.shape)
    tiles = kernel == stride and not any(padding) and all(d == 1 for d in dilation)
    inside = all(p * k <= n for p, k, n in zip(places, kernel, size, strict=True))
    if axes == 2 and tiles and inside:
        return _tiled_max_pool_backward(grad, image, y, kernel).reshape(out.shape)
    # Index minus the index of the window's first tap: one small number a tap.
    apart = [math.prod(size[i + 1 :]) for i in range(axes)]  # indices from a place to the next
    first = _planes(indices.shape, size)
    for i in range(axes):
        along = (np.arange(places[i]) * stride[i] - padding[i]) * apart[i]
        first = first + along.reshape(-1, *(1 for _ in size[i + 1 :]))
    local = indices - g.constant(first, torch.int64)
    taps = list(itertools.product(*(range(k) for k in kernel)))
    numbers = [sum(tap[i] * dilation[i] * apart[i] for i in range(axes)) for tap in taps]
    parts = [grad * local.equals(number).cast(grad.dtype) for number in numbers]
    planes = y.shape[0] * y.shape[1]
    stacked = concat([part.reshape((planes, 1, *places)) for part in parts], 1)
    one_hot = np.eye(len(taps)).reshape(len(taps), 1, *kernel)
    return _spread(stacked, one_hot, stride, padding, dilation, size).reshape(out.shape)


def _tiled_max_pool_backward(dy: Value, x: Value, y: Value, kernel: Ints) -> Value:
    """Windows that tile the image: the gradient goes to the first tap that equals the maximum.

    Nothing here reads the indices, so the forward pass need not make them; ONNX Runtime's MaxPool
    is much faster without.
    """
    rows, columns = dy.shape[2:]
    size = [rows * kernel[0], columns * kernel[1]]
    image = slice_(x, [2, 3], [0, 0], size, [1, 1])
    equal = _equals(image, enlarge(y, kernel))
    # Among equals the one with the greatest rank is the first.
    rank = np.arange(kernel[0] * kernel[1], 0, -1).reshape(kernel)
    ranked = equal * dy.graph.constant(np.tile(rank, (rows, columns)), dy.dtype)
    first = ranked.node("MaxPool", shape=dy.shape, kernel_shape=kernel, strides=kernel)
    chosen = _equals(ranked, enlarge(first, kernel))
    lack = [n - s for n, s in zip(x.shape[2:], size, strict=True)]
    return pad(enlarge(dy, kernel) * chosen, [0, 0], lack)


def _equals(a: Value, b: Value) -> Value:
    """1 where a equals b, 0 elsewhere."""
    return a.equals(b).cast(a.dtype)


def _spread(
    a: Value, weight: Any, stride: Ints, padding: Ints, dilation: Ints, size: Ints
) -> Value:
    """Transposed convolution of (M, taps, *places) to (M, 1, *size)."""
    kernel, places = weight.shape[2:], a.shape[2:]
    full = [
        (places[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(len(kernel))
    ]
    y = a.node(
        "ConvTranspose", a.graph.constant(weight, a.dtype), shape=(a.shape[0], 1, *full),
        kernel_shape=list(kernel), strides=list(stride), dilations=list(dilation),
    )  # fmt: skip
    cut = [-p for p in padding]
    return pad(y, cut, [size[i] - full[i] + padding[i] for i in range(len(kernel))])


def _avg_pool(
    axes: int, g: Graph, out: Spec, x: Value, kernel: Ints, stride: Ints = (),
    padding: Ints | int = 0, ceil_mode: bool = False, count_pads: bool = True,
    divisor: int | None = None,
) -> Value:  # fmt: skip
    kernel = _each(kernel, (), axes)
    stride, padding = _each(stride, kernel, axes), _each(padding, (), axes)
    _check_average(x, out.shape, kernel, stride, padding, divisor)
    image = _batched(x, axes)
    y = g.node(
        "AveragePool", image, shape=(*image.shape[:2], *out.shape[-axes:]), dtype=x.dtype,
        kernel_shape=kernel, strides=stride, pads=[*padding, *padding],
        count_include_pad=int(count_pads),
    )  # fmt: skip
    return y.reshape(out.shape)


def _check_average(
    x: Value, out: Ints, kernel: Ints, stride: Ints, padding: Ints, divisor: int | None
) -> None:
    axes = len(kernel)
    past = _overhang(x.shape[-axes:], out[-axes:], kernel, stride, padding, [1] * axes)
    if any(past[i] > padding[i] for i in range(axes)) or divisor is not None:
        raise Unsupported(
            "average pooling whose windows reach past the padded image, or with a divisor of its "
            "own; pad the image first (ceil_mode=False, divisor_override=None)"
        )


def _avg_pool_backward(
    axes: int, g: Graph, out: Spec, dy: Value, x: Value, kernel: Ints, stride: Ints, padding: Ints,
    ceil_mode: bool, count_pads: bool, divisor: int | None,
) -> Value:  # fmt: skip
    kernel = _each(kernel, (), axes)
    stride, padding = _each(stride, kernel, axes), _each(padding, (), axes)
    _check_average(x, dy.shape, kernel, stride, padding, divisor)
    size, places = x.shape[-axes:], dy.shape[-axes:]
    counts = np.full(places, math.prod(kernel))
    if not count_pads:
        firsts = [np.arange(places[i]) * stride[i] - padding[i] for i in range(axes)]
        inside = [
            np.minimum(first + kernel[i], size[i]) - np.maximum(first, 0)
            for i, first in enumerate(firsts)
        ]
        counts = functools.reduce(np.multiply.outer, inside)
    shared = dy * g.constant(1 / counts, dy.dtype)
    alone = shared.reshape((math.prod(dy.shape[:-axes]), 1, *places))
    if axes == 2 and kernel == stride and not any(padding):
        lack = [n - p * k for n, p, k in zip(size, places, kernel, strict=True)]
        return pad(enlarge(alone, kernel), [0, 0], lack).reshape(out.shape)
    ones = np.ones((1, 1, *kernel))
    return _spread(alone, ones, stride, padding, [1] * axes, size).reshape(out.shape)


_RULES: dict[str, Callable[..., Any]] = {
    "max_pool{}d_with_indices": _max_pool,
    "max_pool{}d_with_indices_backward": _max_pool_backward,
    "avg_pool{}d": _avg_pool,
    "avg_pool{}d_backward": _avg_pool_backward,
}
for _axes in (2, 3):
    for _name, _lower in _RULES.items():
        rule(getattr(aten, _name.format(_axes)).default)(functools.partial(_lower, _axes))


def _divides(size: Ints, parts: Ints) -> bool:
    return not any(n % p for n, p in zip(size, parts, strict=True))


@rule(aten.adaptive_max_pool2d.default)
def _adaptive_max(g: Graph, out: tuple[Spec, ...], x: Value, size: Ints) -> tuple[Value, ...]:
    return _max_pool(2, g, out, x, _window(x.shape[-2:], out[0].shape[-2:]))


@rule(aten.adaptive_max_pool2d_backward.default)
def _adaptive_max_backward(g: Graph, out: Spec, dy: Value, x: Value, indices: Value) -> Value:
    kernel = _window(x.shape[-2:], dy.shape[-2:])
    return _max_pool_backward(2, g, out, dy, x, kernel, kernel, (0,), (1,), False, indices)


def _window(size: Ints, parts: Ints) -> Ints:
    if not _divides(size, parts):
        raise Unsupported(
            f"adaptive max pooling of {list(size)} to {list(parts)}, whose windows overlap; use "
            f"MaxPool2d, AdaptiveAvgPool2d, or a size that divides"
        )
    return [n // p for n, p in zip(size, parts, strict=True)]


@rule(aten._adaptive_avg_pool2d.default)  # noqa: SLF001
def _adaptive(g: Graph, out: Spec, x: Value, size: Ints) -> Value:
    whole, parts = x.shape[-2:], out.shape[-2:]
    if _divides(whole, parts):
        return _avg_pool(2, g, out, x, _window(whole, parts))
    return resized(x, averages(whole, parts))


@rule(aten._adaptive_avg_pool2d_backward.default)  # noqa: SLF001
def _adaptive_backward(g: Graph, out: Spec, dy: Value, x: Value) -> Value:
    whole, parts = x.shape[-2:], dy.shape[-2:]
    if not _divides(whole, parts):
        return resized(dy, [matrix.T for matrix in averages(whole, parts)])
    kernel = _window(whole, parts)
    shared = dy * (1 / math.prod(kernel))
    if parts == (1, 1):
        return shared.expand(out.shape)
    alone = shared.reshape((math.prod(dy.shape[:-2]), 1, *parts))
    return enlarge(alone, kernel).reshape(out.shape)
