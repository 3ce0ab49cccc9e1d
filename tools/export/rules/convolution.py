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
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graph import Graph, Spec, Value
from tools.export.rules.elementwise import mul
from tools.export.rules.layout import concat, flip, pad, reshape, slice_, transpose
from tools.export.rules.reduction import reduce
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
    if transposed:  # forward and backward change places
        if mask[0]:
            dx = _forward(g, x.shape, grad, weight, None, stride, padding, dilation, groups)
        if mask[1]:
            dw = _weight_gradient(g, weight.shape, grad, x, stride, padding, dilation, groups)
    else:
        if mask[0]:
            dx = _input_gradient(g, x, grad, weight, stride, padding, dilation, groups)
        if mask[1]:
            dw = _weight_gradient(g, weight.shape, x, grad, stride, padding, dilation, groups)
    if mask[2]:
        db = reduce(g, "ReduceSum", grad, [0, *range(2, len(grad.shape))])
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
    batch, places = x.shape[0], list(grad.shape[2:])
    axes = range(len(kernel))
    length = 1
    for n in places:
        length *= n
    padded = pad(g, x, padding, padding)
    left = reshape(g, grad, (batch, groups, outputs // groups, length))
    taps = []
    for tap in itertools.product(*(range(k) for k in kernel)):
        starts = [dilation[i] * tap[i] for i in axes]
        stops = [starts[i] + (places[i] - 1) * stride[i] + 1 for i in axes]
        seen = slice_(g, padded, [2 + i for i in axes], starts, stops, stride)
        product = _outer(g, left, reshape(g, seen, (batch, groups, inputs, length)))
        taps.append(reduce(g, "ReduceSum", product, [0], keep=True))
    # (taps, groups, outputs / groups, inputs), small by now, -> (outputs, inputs, *kernel)
    return reshape(g, transpose(g, concat(g, taps, 0), [1, 2, 3, 0]), shape)


def _outer(g: Graph, a: Value, b: Value) -> Value:
    """(N, G, O, L) and (N, G, I, L) -> (N, G, O, I): the sum over L of their products."""
    shape = (*a.shape[:2], a.shape[2], b.shape[2])
    if a.shape[2] == 1 and b.shape[2] == 1:  # depthwise: too small for a matrix product
        return reduce(g, "ReduceSum", mul(g, a, b), [3], keep=True)
    return g.node("MatMul", a, transpose(g, b, [0, 1, 3, 2]), shape=shape)
