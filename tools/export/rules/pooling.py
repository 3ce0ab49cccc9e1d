"""Max and average pooling over two axes, and their gradients.

Both gradients spread one number per window back over the window's taps. For windows that tile the
image this is a rearrangement (DepthToSpace); in general it is a transposed convolution of each
channel by itself with a fixed kernel, which ONNX Runtime does without a scatter.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tools.export.graph import Graph, Value
from tools.export.program import Spec
from tools.export.rules.elementwise import cast, mul, sub
from tools.export.rules.layout import concat, enlarge, pad, reshape, slice_
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten
Ints = Sequence[int]


def _pair(values: Ints | int | None, default: Ints) -> list[int]:
    if isinstance(values, int):
        return [values, values]
    listed = list(values or default)
    return listed * 2 if len(listed) == 1 else listed


def _overhang(a: Ints, out: Ints, kernel: Ints, stride: Ints, padding: Ints, dil: Ints) -> Ints:
    """How far the last window reaches past the end (negative: how much it leaves out)."""
    return [
        (out[i] - 1) * stride[i] + dil[i] * (kernel[i] - 1) + 1 - a[i] - padding[i]
        for i in range(len(kernel))
    ]


@rule(aten.max_pool2d_with_indices.default)
def _max_pool(
    g: Graph, out: tuple[Spec, ...], x: Value, kernel: Ints, stride: Ints = (),
    padding: Ints | int = 0, dilation: Ints | int = 1, ceil_mode: bool = False,
) -> tuple[Value, ...]:  # fmt: skip
    # Indices count through the whole tensor here, not through one plane as in PyTorch; our own
    # backward rule is their only reader.
    kernel = _pair(kernel, ())
    stride, padding, dilation = _pair(stride, kernel), _pair(padding, ()), _pair(dilation, ())
    whole = len(x.shape) == 4
    image = x if whole else reshape(g, x, (1, *x.shape))
    places = out[0].shape[-2:]
    past = _overhang(x.shape[-2:], places, kernel, stride, padding, dilation)
    after = [max(0, n) for n in past] if ceil_mode else padding
    shape = (*image.shape[:2], *places)
    y, indices = g.nodes(
        "MaxPool", image, outputs=[Spec(shape), Spec(shape, torch.int64)], kernel_shape=kernel,
        strides=stride, pads=[*padding, *after], dilations=dilation,
    )  # fmt: skip
    return (y if whole else reshape(g, y, out[0].shape)), indices


@rule(aten.max_pool2d_with_indices_backward.default)
def _max_pool_backward(
    g: Graph, out: Spec, dy: Value, x: Value, kernel: Ints, stride: Ints, padding: Ints,
    dilation: Ints, ceil_mode: bool, indices: Value,
) -> Value:  # fmt: skip
    kernel = _pair(kernel, ())
    stride, padding, dilation = _pair(stride, kernel), _pair(padding, ()), _pair(dilation, ())
    height, width = x.shape[-2:]
    batch, channels, rows, columns = indices.shape
    grad = reshape(g, dy, indices.shape)
    if kernel == stride and not any(padding) and dilation == [1, 1]:
        image = reshape(g, x, (batch, channels, height, width))
        spread = _tiled_max_pool_backward(g, grad, image, kernel, indices)
        if spread is not None:
            return reshape(g, spread, out.shape)
    # Index minus the index of the window's first tap: one small number a tap.
    planes = np.arange(batch * channels).reshape(batch, channels, 1, 1) * (height * width)
    down = np.arange(rows).reshape(rows, 1) * stride[0] - padding[0]
    along = np.arange(columns) * stride[1] - padding[1]
    local = sub(g, sub(g, indices, g.constant(planes, torch.int64)),
                g.constant(down * width + along, torch.int64))  # fmt: skip
    taps = list(itertools.product(range(kernel[0]), range(kernel[1])))
    parts = []
    for tap in taps:
        number = g.constant(tap[0] * dilation[0] * width + tap[1] * dilation[1], torch.int64)
        chosen = g.node("Equal", local, number, shape=grad.shape, dtype=torch.bool)
        parts.append(mul(g, grad, cast(g, chosen, torch.float32)))
    alone = (batch * channels, 1, rows, columns)
    stacked = concat(g, [reshape(g, part, alone) for part in parts], 1)
    one_hot = np.eye(len(taps), dtype=np.float32).reshape(len(taps), 1, *kernel)
    spread = _spread(g, stacked, one_hot, stride, padding, dilation, (height, width))
    return reshape(g, spread, out.shape)


def _tiled_max_pool_backward(
    g: Graph, dy: Value, x: Value, kernel: Ints, indices: Value
) -> Value | None:
    """Windows that tile the image: the gradient goes to the first tap that equals the maximum.

    Nothing here reads the indices, so that the forward pass need not make them: without, ONNX
    Runtime's MaxPool is 20 times faster. None where a window reaches past the end.
    """
    rows, columns = dy.shape[2:]
    size = [rows * kernel[0], columns * kernel[1]]
    lack = [n - s for n, s in zip(x.shape[2:], size, strict=True)]
    maker = g.maker(indices)
    if min(lack) < 0 or maker is None:
        return None
    image = slice_(g, x, [2, 3], [0, 0], size, [1, 1])
    equal = _equals(g, image, enlarge(g, g.value(maker.outputs[0]), kernel))
    # Among equals the one with the greatest rank is the first.
    rank = np.arange(kernel[0] * kernel[1], 0, -1, dtype=np.float32).reshape(kernel)
    ranked = mul(g, equal, g.constant(np.tile(rank, (rows, columns))))
    first = g.node("MaxPool", ranked, shape=dy.shape, kernel_shape=kernel, strides=kernel)
    chosen = _equals(g, ranked, enlarge(g, first, kernel))
    return pad(g, mul(g, enlarge(g, dy, kernel), chosen), [0, 0], lack)


def _equals(g: Graph, a: Value, b: Value) -> Value:
    """1 where a equals b, 0 elsewhere."""
    equal = g.node("Equal", a, b, shape=a.shape, dtype=torch.bool)
    return cast(g, equal, torch.float32)


def _spread(
    g: Graph, a: Value, weight: Any, stride: Ints, padding: Ints, dilation: Ints, size: Ints
) -> Value:
    """Transposed convolution of (M, taps, rows, columns) to (M, 1, *size)."""
    kernel, places = weight.shape[2:], a.shape[2:]
    full = [
        (places[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(len(kernel))
    ]
    y = g.node(
        "ConvTranspose", a, g.constant(weight), shape=(a.shape[0], 1, *full),
        kernel_shape=list(kernel), strides=list(stride), dilations=list(dilation),
    )  # fmt: skip
    cut = [-p for p in padding]
    return pad(g, y, cut, [size[i] - full[i] + padding[i] for i in range(len(kernel))])


@rule(aten.avg_pool2d.default)
def _avg_pool(
    g: Graph, out: Spec, x: Value, kernel: Ints, stride: Ints = (), padding: Ints | int = 0,
    ceil_mode: bool = False, count_pads: bool = True, divisor: int | None = None,
) -> Value:  # fmt: skip
    kernel = _pair(kernel, ())
    stride, padding = _pair(stride, kernel), _pair(padding, ())
    _check_average(x, out.shape, kernel, stride, padding, divisor)
    whole = len(x.shape) == 4
    image = x if whole else reshape(g, x, (1, *x.shape))
    y = g.node(
        "AveragePool", image, shape=(*image.shape[:2], *out.shape[-2:]), kernel_shape=kernel,
        strides=stride, pads=[*padding, *padding], count_include_pad=int(count_pads),
    )  # fmt: skip
    return reshape(g, y, out.shape)


def _check_average(
    x: Value, out: Ints, kernel: Ints, stride: Ints, padding: Ints, divisor: int | None
) -> None:
    past = _overhang(x.shape[-2:], out[-2:], kernel, stride, padding, [1, 1])
    if any(past[i] > padding[i] for i in range(2)) or divisor is not None:
        raise Unsupported(
            "average pooling whose windows reach past the padded image, or with a divisor of its "
            "own; pad the image first (ceil_mode=False, divisor_override=None)"
        )


@rule(aten.avg_pool2d_backward.default)
def _avg_pool_backward(
    g: Graph, out: Spec, dy: Value, x: Value, kernel: Ints, stride: Ints, padding: Ints,
    ceil_mode: bool, count_pads: bool, divisor: int | None,
) -> Value:  # fmt: skip
    kernel = _pair(kernel, ())
    stride, padding = _pair(stride, kernel), _pair(padding, ())
    _check_average(x, dy.shape, kernel, stride, padding, divisor)
    height, width = x.shape[-2:]
    rows, columns = dy.shape[-2:]
    counts = np.ones((rows, columns), np.float32) * (kernel[0] * kernel[1])
    if not count_pads:
        inside = [
            np.minimum(np.arange(n) * stride[i] - padding[i] + kernel[i], size)
            - np.maximum(np.arange(n) * stride[i] - padding[i], 0)
            for i, (n, size) in enumerate([(rows, height), (columns, width)])
        ]
        counts = np.outer(*inside).astype(np.float32)
    shared = mul(g, dy, g.constant(1 / counts))
    if kernel == stride and not any(padding):
        tiled = enlarge(g, reshape(g, shared, (math.prod(dy.shape[:-2]), 1, rows, columns)), kernel)
        lack = [height - rows * kernel[0], width - columns * kernel[1]]
        return reshape(g, pad(g, tiled, [0, 0], lack), out.shape)
    alone = reshape(g, shared, (math.prod(dy.shape[:-2]), 1, rows, columns))
    ones = np.ones((1, 1, *kernel), np.float32)
    return reshape(g, _spread(g, alone, ones, stride, padding, [1, 1], (height, width)), out.shape)


@rule(aten._adaptive_avg_pool2d.default)  # noqa: SLF001
def _adaptive(g: Graph, out: Spec, x: Value, size: Ints) -> Value:
    kernel = _divided(x.shape[-2:], out.shape[-2:])
    return _avg_pool(g, out, x, kernel)


@rule(aten._adaptive_avg_pool2d_backward.default)  # noqa: SLF001
def _adaptive_backward(g: Graph, out: Spec, dy: Value, x: Value) -> Value:
    rows, columns = _divided(x.shape[-2:], dy.shape[-2:])
    *free, height, width = dy.shape
    shared = mul(g, dy, 1 / (rows * columns))
    if (height, width) == (1, 1):
        return g.expand(shared, out.shape)
    alone = reshape(g, shared, (math.prod(free), 1, height, width))
    return reshape(g, enlarge(g, alone, (rows, columns)), out.shape)


def _divided(size: Ints, parts: Ints) -> list[int]:
    if any(n % p for n, p in zip(size, parts, strict=True)):
        raise Unsupported(
            f"adaptive average pooling of {list(size)} to {list(parts)}; use a size that divides"
        )
    return [n // p for n, p in zip(size, parts, strict=True)]
