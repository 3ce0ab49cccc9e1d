"""Convolution and its gradients, for any rank, stride, padding, dilation and number of groups.

With x padded to xp, y[o, p] = sum over c, t of w[o, c, t] * xp[c, stride * p + dilation * t], where
p runs over the output's places and t over the kernel's taps. From this:

    dw[o, c, t] = sum over p of dy[o, p] * xp[c, stride * p + dilation * t]
    dx          = the transposed convolution of dy with w

For one tap of dw, the right factor is a strided slice of xp. The sum over p is a matrix product of
dy (N, Co, P) with the slice (N, Ci, P) transposed, summed over the batch. A convolution with N as
channels would say the same, but falls on ONNX Runtime's slow path (a kernel as large as the image).
For dx at stride 1 the transposed convolution is a convolution with the flipped kernel, which is
faster.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.layers import pointwise
from tools.export.rules.layout import concat, flip, pad, slice_, slice_axis
from tools.export.rules.reduction import outer
from tools.export.rules.registry import rule

aten: Any = torch.ops.aten
Ints = Sequence[int]


@dataclass(frozen=True)
class _Geometry:
    """How a kernel moves over an image: one number an axis, and the number of groups."""

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    def attributes(self, kernel: Ints) -> dict[str, Any]:
        """The attributes of ONNX's Conv and ConvTranspose."""
        return {
            "kernel_shape": list(kernel),
            "strides": list(self.stride),
            "pads": [*self.padding, *self.padding],
            "dilations": list(self.dilation),
            "group": self.groups,
        }


@rule(aten.convolution.default)
def _convolution(
    g: Graph, out: Spec, x: Value, weight: Value, bias: Value | None, stride: Ints, padding: Ints,
    dilation: Ints, transposed: bool, output_padding: Ints, groups: int,
) -> Value:  # fmt: skip
    geometry = _Geometry(stride, padding, dilation, groups)
    if transposed:
        return _transposed(x, weight, bias, geometry, out.shape, output_padding)
    return _forward(x, weight, bias, geometry, out.shape)


@rule(aten.convolution_backward.default)
def _convolution_backward(
    g: Graph, out: tuple[Spec, ...], grad: Value, x: Value, weight: Value, bias_sizes: Ints | None,
    stride: Ints, padding: Ints, dilation: Ints, transposed: bool, output_padding: Ints,
    groups: int, mask: Sequence[bool],
) -> tuple[Value | None, ...]:  # fmt: skip
    geometry = _Geometry(stride, padding, dilation, groups)
    dx = dw = db = None
    folded = g.noted(grad, pointwise.Gradient)
    if folded is not None and folded.x.z == x and folded.x.weight == weight:
        # batch norm takes any bias away, so that its gradient is 0
        dw = pointwise.weight_gradient(folded) if mask[1] else None
        dx = pointwise.input_gradient(folded) if mask[0] else None
        return dx, dw, g.constant([0.0] * weight.shape[0]) if mask[2] else None
    # The large result last: fewer large tensors are alive at a time.
    if mask[2]:
        db = grad.sum([0, *range(2, len(grad.shape))])
    if mask[1]:
        image, places = (grad, x) if transposed else (x, grad)  # the two change places
        dw = _weight_gradient(image, places, geometry, weight.shape)
    if mask[0] and transposed:
        dx = _forward(grad, weight, None, geometry, x.shape)
    elif mask[0]:
        dx = _input_gradient(x, grad, weight, geometry)
    return dx, dw, db


def _forward(
    x: Value, weight: Value, bias: Value | None, geometry: _Geometry, shape: Ints
) -> Value:
    others = [weight] if bias is None else [weight, bias]
    return x.node("Conv", *others, shape=shape, **geometry.attributes(weight.shape[2:]))


def _transposed(
    x: Value, weight: Value, bias: Value | None, geometry: _Geometry, shape: Ints,
    output_padding: Ints,
) -> Value:  # fmt: skip
    others = [weight] if bias is None else [weight, bias]
    attributes = geometry.attributes(weight.shape[2:]) | {"output_padding": list(output_padding)}
    return x.node("ConvTranspose", *others, shape=shape, **attributes)


def _input_gradient(x: Value, grad: Value, weight: Value, geometry: _Geometry) -> Value:
    stride, padding, dilation = geometry.stride, geometry.padding, geometry.dilation
    kernel = weight.shape[2:]
    axes = range(len(kernel))
    reach = [dilation[i] * (kernel[i] - 1) for i in axes]
    margin = [reach[i] - padding[i] for i in axes]
    if all(s == 1 for s in stride) and min(margin) >= 0:
        flipped = flip(weight, [2 + i for i in axes])
        swapped = _swap_channels(flipped, geometry.groups)
        return _forward(grad, swapped, None, replace(geometry, padding=margin), x.shape)
    if all(k == 1 for k in kernel) and not any(padding):
        # The places that the stride passes over have no gradient: a product at the small size,
        # then spread out with zeros.
        ones = [1 for _ in axes]
        dense = _Geometry(ones, padding, ones, geometry.groups)
        swapped = _swap_channels(weight, geometry.groups)
        small = _forward(grad, swapped, None, dense, (*x.shape[:2], *grad.shape[2:]))
        return _spread(small, x.shape[2:], stride)
    lack = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] + reach[i] + 1 - 2 * padding[i])
        for i in axes
    ]
    return _transposed(grad, weight, None, geometry, x.shape, lack)


def _spread(a: Value, size: Ints, stride: Ints) -> Value:
    """Place a (N, C, *small) on every stride-th place of zeros (N, C, *size)."""
    batch, channels, *small = a.shape
    apart = a.reshape([batch, channels, *itertools.chain(*((n, 1) for n in small))])
    after = list(itertools.chain(*((0, s - 1) for s in stride)))
    padded = pad(apart, [0] * len(after), after)
    whole = [n * s for n, s in zip(small, stride, strict=True)]
    joined = padded.reshape([batch, channels, *whole])
    return pad(joined, [0] * len(small), [n - w for n, w in zip(size, whole, strict=True)])


def _swap_channels(weight: Value, groups: int) -> Value:
    """(groups * outputs, inputs, *kernel) -> (groups * inputs, outputs, *kernel)."""
    outputs, inputs, *kernel = weight.shape
    axes = range(3, 3 + len(kernel))
    apart = weight.reshape([groups, outputs // groups, inputs, *kernel])
    return apart.transpose([0, 2, 1, *axes]).reshape([groups * inputs, outputs // groups, *kernel])


def _weight_gradient(x: Value, grad: Value, geometry: _Geometry, shape: Ints) -> Value:
    outputs, inputs, *kernel = shape
    groups = geometry.groups
    batch, places, taps = x.shape[0], list(grad.shape[2:]), math.prod(kernel)
    padded = pad(x, geometry.padding, geometry.padding)
    if inputs == 1 and outputs == groups:
        return _depthwise_gradient(padded, grad, geometry, shape)
    plain = groups == 1 and all(s == 1 for s in geometry.stride) and len(kernel) == 2
    if plain and taps * inputs > kernel[1] * inputs + kernel[0] * outputs:
        return _split_gradient(padded, grad, geometry.dilation, shape)
    windows = concat(list(_windows(padded, kernel, places, geometry)), 1)
    length = math.prod(places)
    # (N, taps, groups, inputs, L) -> (N, groups, taps * inputs, L); one group needs no move
    columns = windows.reshape((batch, taps, groups, inputs, length))
    columns = columns.transpose([0, 2, 1, 3, 4]) if groups > 1 else columns
    columns = columns.reshape((batch, groups, taps * inputs, length))
    rows = grad.reshape((batch, groups, outputs // groups, length))
    apart = outer(rows, columns).reshape((outputs, taps, inputs))
    return apart.transpose([0, 2, 1]).reshape(shape)


def _depthwise_gradient(padded: Value, grad: Value, geometry: _Geometry, shape: Ints) -> Value:
    """Sums of products: one channel a group is too small for matrix products."""
    channels, _, *kernel = shape
    places = list(grad.shape[2:])
    sides = range(2, len(grad.shape))
    windows = _windows(padded, kernel, places, geometry)
    taps = [(grad * window).sum([0, *sides]) for window in windows]
    return concat([tap.reshape((channels, 1)) for tap in taps], 1).reshape(shape)


def _windows(padded: Value, kernel: Ints, places: Ints, geometry: _Geometry) -> Iterator[Value]:
    """The part of the image that each tap of the kernel reads, (N, C, *places)."""
    stride, dilation = geometry.stride, geometry.dilation
    axes = range(len(kernel))
    for tap in itertools.product(*(range(k) for k in kernel)):
        starts = [dilation[i] * tap[i] for i in axes]
        stops = [starts[i] + (places[i] - 1) * stride[i] + 1 for i in axes]
        yield slice_(padded, [2 + i for i in axes], starts, stops, stride)


def _split_gradient(padded: Value, grad: Value, dilation: Ints, shape: Ints) -> Value:
    """The weight gradient by one product for each column of the kernel.

    Let X_j be xp from column j on, and D_i be dy moved down by i rows in an image as high as xp.
    Then dw[o, c, i, j] = sum of D_i[o] X_j[c]. With all D_i in one matrix (k Co, L) there are k
    copies of dy and k of x instead of k^2 of x, and k large products instead of k^2 small ones.
    """
    outputs, inputs, down, along = shape
    batch, _, height, _ = padded.shape
    rows, width = grad.shape[2:]
    # All D_i in a row are copies of dy with gaps of zeros between them. A copy and its gap are as
    # long as the image and `dilation` rows more, so that each copy starts so many rows later.
    length = height * width
    zero = grad.graph.constant(0, grad.dtype)
    gap = zero.expand((batch, outputs, (height - rows + dilation[0]) * width))
    flat = grad.reshape((batch, outputs, rows * width))
    moved = concat([flat, *itertools.chain(*((gap, flat) for _ in range(down - 1)))], 2)
    left = moved.reshape((batch, outputs * down, length))
    products = []
    for start in range(0, dilation[1] * along, dilation[1]):
        column = slice_axis(padded, 3, start, start + width)
        product = outer(left, column.reshape((batch, inputs, length)))
        products.append(product.reshape((outputs, down, inputs, 1)))
    return concat(products, 3).transpose([0, 2, 1, 3])
