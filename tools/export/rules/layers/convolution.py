"""Convolution and its gradients, for any rank, stride, padding, dilation and number of groups.

With x padded to xp, y[o, p] = sum over c, t of w[o, c, t] * xp[c, stride * p + dilation * t], where
p runs over the output's places and t over the kernel's taps. From this:

    dw[o, c, t] = sum over p of dy[o, p] * xp[c, stride * p + dilation * t]
    dx          = the transposed convolution of dy with w

For dw, one tap at a time, the right factor is a strided slice of xp, and the sum over p a matrix
product of dy (N, Co, P) with the slice (N, Ci, P) transposed, then summed over the batch. Writing
it as a convolution with N as channels falls on ONNX Runtime's slow path (a kernel as large as the
image). For dx at stride 1 the transposed convolution is a convolution with the flipped kernel,
which has the faster implementation.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec
from tools.export.rules.elementwise import mul
from tools.export.rules.layers import pointwise
from tools.export.rules.layout import concat, flip, pad, reshape, slice_, transpose
from tools.export.rules.reduction import outer, reduce
from tools.export.rules.registry import rule

aten: Any = torch.ops.aten
Ints = Sequence[int]


@rule(aten.convolution.default)
def _convolution(
    g: Graph, out: Spec, x: Value, weight: Value, bias: Value | None, stride: Ints, padding: Ints,
    dilation: Ints, transposed: bool, output_padding: Ints, groups: int,
) -> Value:  # fmt: skip
    if transposed:
        return _transposed(
            g, out.shape, x, weight, bias, stride, padding, dilation, groups, output_padding
        )
    return _forward(g, out.shape, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.convolution_backward.default)
def _convolution_backward(
    g: Graph, out: tuple[Spec, ...], grad: Value, x: Value, weight: Value, bias_sizes: Ints | None,
    stride: Ints, padding: Ints, dilation: Ints, transposed: bool, output_padding: Ints,
    groups: int, mask: Sequence[bool],
) -> tuple[Value | None, ...]:  # fmt: skip
    dx = dw = db = None
    through = g.noted(grad, pointwise.Gradient)
    if through is not None and through.of.z == x and through.of.weight == weight:
        # batch norm takes any bias away, so that its gradient is 0
        dw = pointwise.weight_gradient(g, through) if mask[1] else None
        dx = pointwise.input_gradient(g, through) if mask[0] else None
        return dx, dw, g.constant([0.0] * weight.shape[0]) if mask[2] else None
    # The large result last: fewer large tensors are alive at a time.
    if mask[2]:
        db = reduce(g, "ReduceSum", grad, [0, *range(2, len(grad.shape))])
    if mask[1]:
        left, right = (grad, x) if transposed else (x, grad)  # the two change places
        dw = _weight_gradient(g, weight.shape, left, right, stride, padding, dilation, groups)
    if mask[0] and transposed:
        dx = _forward(g, x.shape, grad, weight, None, stride, padding, dilation, groups)
    elif mask[0]:
        dx = _input_gradient(g, x, grad, weight, stride, padding, dilation, groups)
    return dx, dw, db


def _forward(
    g: Graph, shape: Ints, x: Value, weight: Value, bias: Value | None, stride: Ints,
    padding: Ints, dilation: Ints, groups: int,
) -> Value:  # fmt: skip
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.node(
        "Conv", *inputs, shape=shape, kernel_shape=list(weight.shape[2:]), strides=list(stride),
        pads=[*padding, *padding], dilations=list(dilation), group=groups,
    )  # fmt: skip


def _transposed(
    g: Graph, shape: Ints, x: Value, weight: Value, bias: Value | None, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, output_padding: Ints,
) -> Value:  # fmt: skip
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return g.node(
        "ConvTranspose", *inputs, shape=shape, kernel_shape=list(weight.shape[2:]),
        strides=list(stride), pads=[*padding, *padding], dilations=list(dilation), group=groups,
        output_padding=list(output_padding),
    )  # fmt: skip


def _input_gradient(
    g: Graph, x: Value, grad: Value, weight: Value, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> Value:  # fmt: skip
    kernel = weight.shape[2:]
    axes = range(len(kernel))
    reach = [dilation[i] * (kernel[i] - 1) for i in axes]
    turned = [reach[i] - padding[i] for i in axes]
    if all(s == 1 for s in stride) and min(turned) >= 0:
        swapped = _swap_channels(g, flip(g, weight, [2 + i for i in axes]), groups)
        return _forward(g, x.shape, grad, swapped, None, stride, turned, dilation, groups)
    if all(k == 1 for k in kernel) and not any(padding):
        # The places that the stride passes over have no gradient: a product at the small size,
        # then spread out with zeros.
        small_shape = (x.shape[0], x.shape[1], *grad.shape[2:])
        swapped = _swap_channels(g, weight, groups)
        ones = [1 for _ in axes]
        small = _forward(g, small_shape, grad, swapped, None, ones, padding, ones, groups)
        return spread(g, small, x.shape[2:], stride)
    left = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] + reach[i] + 1 - 2 * padding[i])
        for i in axes
    ]
    return _transposed(g, x.shape, grad, weight, None, stride, padding, dilation, groups, left)


def spread(g: Graph, a: Value, size: Ints, stride: Ints) -> Value:
    """Place a (N, C, *small) on every stride-th place of zeros (N, C, *size)."""
    batch, channels, *small = a.shape
    apart = reshape(g, a, [batch, channels, *itertools.chain(*((n, 1) for n in small))])
    after = list(itertools.chain(*((0, s - 1) for s in stride)))
    padded = pad(g, apart, [0] * len(after), after)
    whole = [n * s for n, s in zip(small, stride, strict=True)]
    joined = reshape(g, padded, [batch, channels, *whole])
    return pad(g, joined, [0] * len(small), [n - w for n, w in zip(size, whole, strict=True)])


def _swap_channels(g: Graph, weight: Value, groups: int) -> Value:
    """(groups * outputs, inputs, *kernel) -> (groups * inputs, outputs, *kernel)."""
    outputs, inputs, *kernel = weight.shape
    axes = range(3, 3 + len(kernel))
    apart = reshape(g, weight, [groups, outputs // groups, inputs, *kernel])
    return reshape(
        g, transpose(g, apart, [0, 2, 1, *axes]), [groups * inputs, outputs // groups, *kernel]
    )


def _weight_gradient(
    g: Graph, shape: Ints, x: Value, grad: Value, stride: Ints, padding: Ints, dilation: Ints,
    groups: int,
) -> Value:  # fmt: skip
    outputs, inputs, *kernel = shape
    batch, places, taps = x.shape[0], list(grad.shape[2:]), math.prod(kernel)
    padded = pad(g, x, padding, padding)
    if inputs == 1 and outputs == groups:  # depthwise: too small for matrix products
        wide = (batch, groups, *places)
        parts = [
            reduce(g, "ReduceSum", mul(g, reshape(g, grad, wide), seen), [0, *_axes(wide)])
            for seen in _windows(g, padded, kernel, places, stride, dilation)
        ]
        return reshape(g, concat(g, [reshape(g, p, (groups, 1)) for p in parts], 1), shape)
    plain = groups == 1 and all(s == 1 for s in stride) and len(kernel) == 2
    if plain and taps * inputs > kernel[1] * inputs + kernel[0] * outputs:
        return _split_gradient(g, shape, padded, grad, dilation)
    seen = concat(g, list(_windows(g, padded, kernel, places, stride, dilation)), 1)
    length = math.prod(places)
    # (N, taps, groups, inputs, L) -> (N, groups, taps * inputs, L); one group needs no move
    columns = reshape(g, seen, (batch, taps, groups, inputs, length))
    columns = transpose(g, columns, [0, 2, 1, 3, 4]) if groups > 1 else columns
    columns = reshape(g, columns, (batch, groups, taps * inputs, length))
    left = reshape(g, grad, (batch, groups, outputs // groups, length))
    apart = reshape(g, outer(g, left, columns), (outputs, taps, inputs))
    return reshape(g, transpose(g, apart, [0, 2, 1]), shape)


def _axes(shape: Ints) -> range:
    return range(2, len(shape))


def _windows(
    g: Graph, padded: Value, kernel: Ints, places: Ints, stride: Ints, dilation: Ints
) -> Iterator[Value]:
    """By tap of the kernel: what the tap sees of the image, (N, C, *places)."""
    axes = range(len(kernel))
    for tap in itertools.product(*(range(k) for k in kernel)):
        starts = [dilation[i] * tap[i] for i in axes]
        stops = [starts[i] + (places[i] - 1) * stride[i] + 1 for i in axes]
        yield slice_(g, padded, [2 + i for i in axes], starts, stops, stride)


def _split_gradient(g: Graph, shape: Ints, padded: Value, grad: Value, dilation: Ints) -> Value:
    """The taps' columns on x's side, their rows on the gradient's: one product a column.

    With X_j = xp from column j on and D_i = dy moved down by i rows in an image as high as xp,
    dw[o, c, i, j] = sum of D_i[o] X_j[c]. With all D_i in one matrix (k Co, L) there are k copies
    of dy and k of x instead of k^2 of x, and k large products instead of k^2 small ones.
    """
    outputs, inputs, down, along = shape
    batch, _, height, _ = padded.shape
    rows, width = grad.shape[2:]
    # Moved by i rows, with as many zeros in all: copies of dy with gaps between them that make
    # each as long as the image and start it i rows later than the one before.
    length = height * width
    gap = g.expand(g.constant(0.0), (batch, outputs, (height - rows + dilation[0]) * width))
    flat = reshape(g, grad, (batch, outputs, rows * width))
    moved = concat(g, [flat, *itertools.chain(*((gap, flat) for _ in range(down - 1)))], 2)
    left = reshape(g, moved, (batch, outputs * down, length))
    products = []
    for start in range(0, dilation[1] * along, dilation[1]):
        column = slice_(g, padded, [3], [start], [start + width], [1])
        product = outer(g, left, reshape(g, column, (batch, inputs, length)))
        products.append(reshape(g, product, (outputs, down, inputs, 1)))
    return transpose(g, concat(g, products, 3), [0, 2, 1, 3])
