"""Batch, group and layer norm in training mode, and their gradients.

Plain reductions compute the statistics, in two passes, and ONNX's BatchNormalization only applies
them, in its evaluation mode. Its training mode is of no use: its running variance is biased, where
PyTorch's is unbiased, and ONNX Runtime writes the statistics over the node's mean and variance
inputs, even if they are constants or graph inputs.

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

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.layers import pointwise
from tools.export.rules.registry import rule

aten: Any = torch.ops.aten


def _vector(g: Graph, vector: Value | None, channels: int, default: float) -> Value:
    """A statistic or a parameter by channel, or the default where the layer has none."""
    return g.constant([default] * channels) if vector is None else vector


def _applied(
    x: Value, scale: Value, bias: Value, mean: Value, variance: Value, eps: float
) -> Value:
    """(x - mean) / sqrt(variance + eps) * scale + bias, by channel."""
    return x.node("BatchNormalization", scale, bias, mean, variance, epsilon=float(eps))


def _normalised(x: Value, scale: Value, bias: Value, eps: float) -> tuple[Value, Value, Value]:
    """The same with the batch's own statistics: output, mean and variance."""
    mean = x.mean(_all_but_channels(x))
    distance = _distance(x, mean)
    variance = (distance * distance).mean(_all_but_channels(x))
    zeros = x.graph.constant([0.0] * x.shape[1])
    return _applied(distance, scale, bias, zeros, variance, eps), mean, variance


def _all_but_channels(x: Value) -> list[int]:
    return [0, *range(2, len(x.shape))]


def _distance(x: Value, mean: Value) -> Value:
    """X - mean, by channel; the backward pass finds the forward's node again."""
    return x - _by_channel(mean, x)


def _by_channel(vector: Value, x: Value) -> Value:
    """One number a channel, shaped to broadcast with x (N, C, ...)."""
    return vector.reshape([x.shape[1]] + [1] * (len(x.shape) - 2))


@rule(aten.native_batch_norm.default)
def batch_norm(
    g: Graph, out: tuple[Spec, ...], x: Value, weight: Value | None, bias: Value | None,
    running_mean: Value | None, running_var: Value | None, training: bool, momentum: float,
    eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    """Output, saved mean, saved 1 / sqrt(variance + eps), new running mean, new running variance.

    PyTorch changes the running statistics in place; `lower` replaces them by the last two.
    """
    channels = x.shape[1]
    scale, shift = _vector(g, weight, channels, 1.0), _vector(g, bias, channels, 0.0)
    if not training:
        mean = _vector(g, running_mean, channels, 0.0)
        variance = _vector(g, running_var, channels, 1.0)
        y = _applied(x, scale, shift, mean, variance, eps)
        return y, mean, _inverse(variance, eps), running_mean, running_var
    convolution = pointwise.widening(x)
    if convolution is None:
        y, mean, variance = _normalised(x, scale, shift, eps)
    else:
        mean, variance = pointwise.statistics(convolution)
        factor = scale * _inverse(variance, eps)
        y = pointwise.normalised(convolution, mean=mean, scale=factor, bias=shift)
        mean = _with_bias(x, mean)
    count = math.prod(x.shape) // channels
    new_mean = _blend(running_mean, mean, momentum)
    new_var = _blend(running_var, variance, momentum, count / (count - 1))
    return y, mean, _inverse(variance, eps), new_mean, new_var


def _with_bias(x: Value, mean: Value) -> Value:
    """The mean of x, with the bias of the convolution that makes it."""
    _, _, *bias = x.sources
    return mean + bias[0] if bias else mean


@rule(aten._native_batch_norm_legit_no_training.default)  # noqa: SLF001
def _batch_norm_evaluated(
    g: Graph, out: tuple[Spec, ...], x: Value, weight: Value | None, bias: Value | None,
    running_mean: Value, running_var: Value, momentum: float, eps: float,
) -> tuple[Value | None, ...]:  # fmt: skip
    return batch_norm(g, out, x, weight, bias, running_mean, running_var, False, momentum, eps)[:3]


def _inverse(variance: Value, eps: float) -> Value:
    """1 / sqrt(variance + eps)."""
    return (variance + eps).node("Sqrt").node("Reciprocal")


@dataclass(frozen=True)
class Blend:
    """A note on a new running statistic: keep * old + take * new."""

    old: Value
    new: Value
    keep: float
    take: float


def _blend(old: Value | None, new: Value, momentum: float, factor: float = 1.0) -> Value | None:
    if old is None:
        return None
    blend = Blend(old, new, 1 - momentum, momentum * factor)
    blended = old * blend.keep + new * blend.take
    old.graph.note(blended, blend)
    return blended


@rule(aten.native_batch_norm_backward.default)
def _batch_norm_backward(
    g: Graph, out: tuple[Spec, ...], dy: Value, x: Value, weight: Value | None,
    running_mean: Value | None, running_var: Value | None, mean: Value | None,
    inverse: Value | None, training: bool, eps: float, mask: list[bool],
) -> tuple[Value, ...]:  # fmt: skip
    channels = x.shape[1]
    if not training:
        mean = _vector(g, running_mean, channels, 0.0)
        inverse = _inverse(_vector(g, running_var, channels, 1.0), eps)
    elif mean is None or inverse is None:
        raise TypeError("batch norm's backward pass in training mode without saved statistics")
    distance = _distance(x, mean)
    total = dy.sum(_all_but_channels(x))
    convolution = pointwise.widening(x) if training else None
    if convolution is None:
        joint = (dy * distance).sum(_all_but_channels(x))
    else:
        joint = pointwise.joint(convolution, dy, total)
    dgamma = joint * inverse
    a = _vector(g, weight, channels, 1.0) * inverse
    dx = dy * _by_channel(a, x)
    if not training:
        return dx, dgamma, total
    per_value = channels / math.prod(x.shape)
    b = a * inverse * dgamma * -per_value
    c = a * total * -per_value
    ones, zeros = g.constant([1.0] * channels), g.constant([0.0] * channels)
    dx += _applied(distance, b, c, zeros, ones, 0.0)
    if convolution is not None:
        tall = [vector.reshape((channels, 1)) for vector in (a, b, c)]
        g.note(dx, pointwise.Gradient(convolution, dy, *tall))
    return dx, dgamma, total


@rule(aten.native_group_norm.default)
def _group_norm(
    g: Graph, out: tuple[Spec, ...], x: Value, weight: Value | None, bias: Value | None,
    batch: int, channels: int, places: int, groups: int, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    # Each group of each sample is a channel of one long batch norm without scale.
    rows = batch * groups
    flat = x.reshape((1, rows, math.prod(x.shape) // rows))
    ones, zeros = g.constant([1.0] * rows), g.constant([0.0] * rows)
    normal, mean, variance = _normalised(flat, ones, zeros, eps)
    y = normal.reshape(x.shape)
    if weight is not None:
        y *= _by_channel(weight, x)
    if bias is not None:
        y += _by_channel(bias, x)
    inverse = _inverse(variance, eps)
    return y, mean.reshape((batch, groups)), inverse.reshape((batch, groups))


@rule(aten.native_layer_norm.default)
def _layer_norm(
    g: Graph, out: tuple[Spec, ...], x: Value, shape: list[int], weight: Value | None,
    bias: Value | None, eps: float,
) -> tuple[Value, ...]:  # fmt: skip
    rows = math.prod(out[1].shape)
    flat = x.reshape((1, rows, math.prod(shape)))
    ones, zeros = g.constant([1.0] * rows), g.constant([0.0] * rows)
    normal, mean, variance = _normalised(flat, ones, zeros, eps)
    y = normal.reshape(x.shape)
    if weight is not None:
        y *= weight
    if bias is not None:
        y += bias
    inverse = _inverse(variance, eps)
    return y, mean.reshape(out[1].shape), inverse.reshape(out[2].shape)
