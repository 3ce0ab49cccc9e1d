"""Activations whose gradients are written better here than PyTorch decomposes them.

Forward and backward share their costly part: a graph holds a repeated node once. A mask is one
`HardSigmoid` of a huge slope, min(1, max(0, 3e38 v)), which is 1 for every v > 0 but a denormal
one; a comparison and a cast are two passes, `Where` is three. The gradients of tanh, sigmoid, ELU,
softplus, mish, log-sigmoid and the clamps are PyTorch's decompositions.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


@rule(aten.gelu.default)
def _gelu(g: Graph, out: Spec, x: Value, *, approximate: str = "none") -> Value:
    return x * _gate(x, approximate)


def _gate(x: Value, approximate: str) -> Value:
    """The normal distribution's P(X < x), or its approximation by tanh."""
    if approximate == "tanh":
        return (_inner(x).node("Tanh") + 1) * 0.5
    return ((x * math.sqrt(0.5)).node("Erf") + 1) * 0.5


def _inner(x: Value) -> Value:
    """sqrt(2 / pi) * (x + 0.044715 x^3)."""
    return x * (x * x * 0.044715 + 1) * math.sqrt(2 / math.pi)


@rule(aten.gelu_backward.default)
def _gelu_backward(
    g: Graph, out: Spec, grad: Value, x: Value, *, approximate: str = "none"
) -> Value:
    square = x * x
    gate = _gate(x, approximate)
    if approximate == "tanh":
        # d gate / dx = 2 gate (1 - gate) * d inner / dx, for gate = (1 + tanh(inner)) / 2
        slope = (square * (3 * 0.044715) + 1) * (2 * math.sqrt(2 / math.pi))
        rise = gate * (1 - gate) * slope
    else:
        rise = (square * -0.5).node("Exp") * (1 / math.sqrt(2 * math.pi))
    return grad * (gate + x * rise)


@rule(aten.silu.default)
def _silu(g: Graph, out: Spec, x: Value) -> Value:
    return x * x.node("Sigmoid")


@rule(aten.silu_backward.default)
def _silu_backward(g: Graph, out: Spec, grad: Value, x: Value) -> Value:
    # With s the sigmoid and y = x s: dy/dx = s + x s (1 - s) = s + y (1 - s).
    s = x.node("Sigmoid")
    return grad * (s + x * s * (1 - s))


@rule(aten.leaky_relu.default)
def _leaky_relu(g: Graph, out: Spec, x: Value, slope: float = 0.01) -> Value:
    return x.node("LeakyRelu", alpha=float(slope))


@rule(aten.leaky_relu_backward.default)
def _leaky_relu_backward(
    g: Graph, out: Spec, grad: Value, x: Value, slope: float, is_result: bool
) -> Value:
    positive = x.node("HardSigmoid", alpha=3e38, beta=0.0)
    return grad * (positive * (1 - slope) + slope)


@rule(aten.elu.default)
def _elu(
    g: Graph, out: Spec, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Value:
    if input_scale != 1:
        raise Unsupported(f"ELU with input scale {input_scale}; use 1, or nn.CELU")
    return x.node("Elu", alpha=float(alpha)) * scale


@rule(aten.hardsigmoid.default)
def _hardsigmoid(g: Graph, out: Spec, x: Value) -> Value:
    """min(1, max(0, x / 6 + 1 / 2))."""
    return x.node("HardSigmoid", alpha=1 / 6, beta=0.5)


def _within(x: Value) -> Value:
    """1 where -3 < x < 3, else 0: where a hard sigmoid rises."""
    return abs(x).node("HardSigmoid", alpha=-1e38, beta=3e38)


@rule(aten.hardsigmoid_backward.default)
def _hardsigmoid_backward(g: Graph, out: Spec, grad: Value, x: Value) -> Value:
    return grad * (_within(x) * (1 / 6))


@rule(aten.hardswish.default)
def _hardswish(g: Graph, out: Spec, x: Value) -> Value:
    return x * _hardsigmoid(g, out, x)


@rule(aten.hardswish_backward.default)
def _hardswish_backward(g: Graph, out: Spec, grad: Value, x: Value) -> Value:
    rise = x * _within(x) * (1 / 6)
    return grad * (_hardsigmoid(g, out, x) + rise)


@rule(aten.hardshrink_backward.default, aten.softshrink_backward.default)
def _shrink_backward(g: Graph, out: Spec, grad: Value, x: Value, bound: float) -> Value:
    return grad * (abs(x) > bound).cast(out.dtype)
