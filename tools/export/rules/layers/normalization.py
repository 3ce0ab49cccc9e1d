"""Batch, group and layer norm in training mode, and their gradients.

The statistics are computed with plain reductions, in two passes, and ONNX's BatchNormalization only
applies them, in its evaluation mode. Its training mode is of no use: its running variance is the
biased one where PyTorch's is unbiased, and ONNX Runtime writes the statistics over the node's own
mean and variance inputs, constants and graph inputs included.

    running' = (1 - momentum) * running + momentum * (mean, or variance * n / (n - 1))

Gradient (Ioffe and Szegedy 2015, arXiv 1502.03167, section 3), folded per channel. With
r = 1 / sqrt(variance + eps), s = sum of dy, d = sum of dy * (x - mean):

    dbeta = s,  dgamma = r d,  dx = a dy + b (x - mean) + c,
    a = gamma r,  b = -gamma r^3 d / n,  c = -gamma r s / n
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from dataclasses import dataclass
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec
from tools.export.rules.elementwise import add, mul, rsqrt, sub
from tools.export.rules.layers import pointwise
from tools.export.rules.layout import reshape
from tools.export.rules.reduction import reduce
from tools.export.rules.registry import rule

aten: Any = torch.ops.aten


def _vector(g: Graph, value: Value | None, channels: int, default: float) -> Value:
    return g.constant([default] * channels) if value is None else value


def _fixed(
    g: Graph, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, eps: float
) -> Value:
    return g.node(
        "BatchNormalization", x, scale, bias, mean, variance, shape=x.shape, epsilon=float(eps)
    )


def _normalised(
    g: Graph, x: Value, scale: Value, bias: Value, eps: float
) -> tuple[Value, Value, Value]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over all but axis 1, mean, variance."""
    mean = reduce(g, "ReduceMean", x, _rest(x))
    distance = _distance(g, x, mean)
    variance = reduce(g, "ReduceMean", mul(g, distance, distance), _rest(x))
    zeros = g.constant([0.0] * x.shape[1])
    return _fixed(g, distance, scale, bias, zeros, variance, eps), mean, variance


def _rest(x: Value) -> list[int]:
    return [0, *range(2, len(x.shape))]


def _distance(g: Graph, x: Value, mean: Value) -> Value:
    """X - mean, by channel; the backward pass finds the forward's node again."""
    return sub(g, x, reshape(g, mean, [x.shape[1]] + [1] * (len(x.shape) - 2)))


@rule(aten.native_batch_norm.default)
def batch_norm(
    g: Graph, out: tuple[Spec, ...], x: Value, weight: Value | None, bias: Value | None,
    running_mean: Value | None, running_var: Value | None, training: bool, momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    """Output, saved mean, saved 1 / sqrt(variance + eps), new running mean, new running variance.

    PyTorch changes the running statistics in place; whoever lowers the node must put the last two
    in their stead.
    """
    channels = x.shape[1]
    scale, shift = _vector(g, weight, channels, 1.0), _vector(g, bias, channels, 0.0)
    if not training:
        mean = _vector(g, running_mean, channels, 0.0)
        variance = _vector(g, running_var, channels, 1.0)
        y = _fixed(g, x, scale, shift, mean, variance, eps)
        return y, mean, _inverse(g, variance, eps), running_mean, running_var
    through = pointwise.seen_through(g, x)
    if through is None:
        y, mean, variance = _normalised(g, x, scale, shift, eps)
    else:
        mean, variance = pointwise.statistics(g, through)
        factor = mul(g, scale, _inverse(g, variance, eps))
        y = pointwise.normalised(g, through, mean=mean, scale=factor, bias=shift)
        mean = _with_bias(g, x, mean)
    count = math.prod(x.shape) // channels
    new_mean = _blend(g, running_mean, mean, momentum)
    new_var = _blend(g, running_var, variance, momentum, count / (count - 1))
    return y, mean, _inverse(g, variance, eps), new_mean, new_var


def _with_bias(g: Graph, x: Value, mean: Value) -> Value:
    """The mean of x, with the bias of the convolution that makes it."""
    maker = g.maker(x)
    bias = None if maker is None or len(maker.inputs) < 3 else g.value(maker.inputs[2])
    return mean if bias is None else add(g, mean, bias)


@rule(aten._native_batch_norm_legit_no_training.default)  # noqa: SLF001
def _batch_norm_evaluated(
    g: Graph, out: tuple[Spec, ...], x: Value, weight: Value | None, bias: Value | None,
    running_mean: Value, running_var: Value, momentum: float, eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    return batch_norm(g, out, x, weight, bias, running_mean, running_var, False, momentum, eps)[:3]


def _inverse(g: Graph, variance: Value, eps: float) -> Value:
    return rsqrt(g, variance, add(g, variance, eps))


@dataclass(frozen=True)
class Blend:
    """A note on a new running statistic: keep * old + take * new."""

    old: Value
    new: Value
    keep: float
    take: float


def _blend(
    g: Graph, old: Value | None, new: Value, momentum: float, factor: float = 1.0
) -> Value | None:
    if old is None:
        return None
    blend = Blend(old, new, 1 - momentum, momentum * factor)
    value = add(g, mul(g, old, blend.keep), mul(g, new, blend.take))
    g.note(value, blend)
    return value


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(
    g: Graph, out: tuple[Spec, ...], dy: Value, x: Value, weight: Value | None,
    running_mean: Value | None, running_var: Value | None, mean: Value | None,
    inverse: Value | None, training: bool, eps: float, mask: list[bool],
) -> tuple[Value, ...]:  # fmt: skip
    channels = x.shape[1]
    if not training:
        mean = _vector(g, running_mean, channels, 0.0)
        inverse = _inverse(g, _vector(g, running_var, channels, 1.0), eps)
    elif mean is None or inverse is None:
        raise TypeError("batch norm's backward pass in training mode without saved statistics")
    distance = _distance(g, x, mean)
    total = reduce(g, "ReduceSum", dy, _rest(x))
    through = pointwise.seen_through(g, x) if training else None
    if through is None:
        joint = reduce(g, "ReduceSum", mul(g, dy, distance), _rest(x))
    else:
        joint = pointwise.joint(g, through, dy, total)
    dgamma = mul(g, joint, inverse)
    a = mul(g, _vector(g, weight, channels, 1.0), inverse)
    wide = [channels] + [1] * (len(x.shape) - 2)
    dx = mul(g, dy, reshape(g, a, wide))
    if not training:
        return dx, dgamma, total
    per_value = channels / math.prod(x.shape)
    b = mul(g, mul(g, mul(g, a, inverse), dgamma), -per_value)
    c = mul(g, mul(g, a, total), -per_value)
    ones, zeros = g.constant([1.0] * channels), g.constant([0.0] * channels)
    dx = add(g, dx, _fixed(g, distance, b, c, zeros, ones, 0.0))
    if through is not None:
        tall = [reshape(g, vector, (channels, 1)) for vector in (a, b, c)]
        g.note(dx, pointwise.Gradient(through, dy, *tall))
    return dx, dgamma, total


@rule(aten.native_group_norm.default)
def _group_norm(
    g: Graph, out: tuple[Spec, ...], x: Value, weight: Value | None, bias: Value | None,
    batch: int, channels: int, places: int, groups: int, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    # Each group of each sample is a channel of one long batch norm without scale.
    rows = batch * groups
    flat = reshape(g, x, (1, rows, math.prod(x.shape) // rows))
    ones, zeros = g.constant([1.0] * rows), g.constant([0.0] * rows)
    normal, mean, variance = _normalised(g, flat, ones, zeros, eps)
    y = reshape(g, normal, x.shape)
    wide = [channels] + [1] * (len(x.shape) - 2)
    if weight is not None:
        y = mul(g, y, reshape(g, weight, wide))
    if bias is not None:
        y = add(g, y, reshape(g, bias, wide))
    inverse = _inverse(g, variance, eps)
    return y, reshape(g, mean, (batch, groups)), reshape(g, inverse, (batch, groups))


@rule(aten.native_layer_norm.default)
def _layer_norm(
    g: Graph, out: tuple[Spec, ...], x: Value, shape: list[int], weight: Value | None,
    bias: Value | None, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    rows = math.prod(out[1].shape)
    flat = reshape(g, x, (1, rows, math.prod(shape)))
    ones, zeros = g.constant([1.0] * rows), g.constant([0.0] * rows)
    normal, mean, variance = _normalised(g, flat, ones, zeros, eps)
    y = reshape(g, normal, x.shape)
    if weight is not None:
        y = mul(g, y, weight)
    if bias is not None:
        y = add(g, y, bias)
    inverse = _inverse(g, variance, eps)
    return y, reshape(g, mean, out[1].shape), reshape(g, inverse, out[2].shape)
