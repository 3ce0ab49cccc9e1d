"""Activations whose gradients are written better here than PyTorch decomposes them.

Forward and backward share their costly part: a graph holds a repeated node once. A mask is one
`HardSigmoid` of a huge slope, min(1, max(0, 3e38 v)), which is 1 for every v > 0 but a denormal
one; a comparison and a cast are two passes, `Where` is three.
Tanh, sigmoid, ELU, softplus, mish, log-sigmoid and the clamps are left to PyTorch's decompositions.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec
from tools.export.rules.elementwise import add, cast, mul, sub, unary
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


@rule(aten.gelu.default)
def _gelu(g: Graph, out: Spec, x: Value, *, approximate: str = "none") -> Value:
    return mul(g, x, _gate(g, x, approximate))


def _gate(g: Graph, x: Value, approximate: str) -> Value:
    """The normal distribution's P(X < x), or its approximation by tanh."""
    if approximate == "tanh":
        raised = unary(g, "Tanh", _inner(g, x))
    else:
        raised = unary(g, "Erf", mul(g, x, math.sqrt(0.5)))
    return mul(g, add(g, raised, 1.0), 0.5)


def _inner(g: Graph, x: Value) -> Value:
    """sqrt(2 / pi) * (x + 0.044715 x^3)."""
    factor = add(g, mul(g, mul(g, x, x), 0.044715), 1.0)
    return mul(g, mul(g, x, factor), math.sqrt(2 / math.pi))


@rule(aten.gelu_backward.default)
def _gelu_backward(
    g: Graph, out: Spec, grad: Value, x: Value, *, approximate: str = "none"
) -> Value:
    square = mul(g, x, x)
    gate = _gate(g, x, approximate)
    if approximate == "tanh":
        # d gate / dx = 2 gate (1 - gate) * d inner / dx, for gate = (1 + tanh(inner)) / 2
        slope = mul(g, add(g, mul(g, square, 3 * 0.044715), 1.0), 2 * math.sqrt(2 / math.pi))
        rise = mul(g, mul(g, gate, sub(g, g.constant(1.0, x.dtype), gate)), slope)
    else:
        rise = mul(g, unary(g, "Exp", mul(g, square, -0.5)), 1 / math.sqrt(2 * math.pi))
    return mul(g, grad, add(g, gate, mul(g, x, rise)))


@rule(aten.silu.default)
def _silu(g: Graph, out: Spec, x: Value) -> Value:
    return mul(g, x, unary(g, "Sigmoid", x))


@rule(aten.silu_backward.default)
def _silu_backward(g: Graph, out: Spec, grad: Value, x: Value) -> Value:
    # With s the sigmoid and y = x s: dy/dx = s + x s (1 - s) = s + y (1 - s).
    s = unary(g, "Sigmoid", x)
    rest = sub(g, g.constant(1.0, x.dtype), s)
    return mul(g, grad, add(g, s, mul(g, mul(g, x, s), rest)))


@rule(aten.leaky_relu.default)
def _leaky_relu(g: Graph, out: Spec, x: Value, slope: float = 0.01) -> Value:
    return unary(g, "LeakyRelu", x, alpha=float(slope))


@rule(aten.leaky_relu_backward.default)
def _leaky_relu_backward(
    g: Graph, out: Spec, grad: Value, x: Value, slope: float, is_result: bool
) -> Value:
    positive = unary(g, "HardSigmoid", x, alpha=3e38, beta=0.0)
    return mul(g, grad, add(g, mul(g, positive, 1 - slope), float(slope)))


@rule(aten.elu.default)
def _elu(
    g: Graph, out: Spec, x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Value:
    if input_scale != 1:
        raise Unsupported(f"ELU with input scale {input_scale}; use 1, or nn.CELU")
    return mul(g, unary(g, "Elu", x, alpha=float(alpha)), float(scale))


@rule(aten.hardsigmoid.default)
def _hardsigmoid(g: Graph, out: Spec, x: Value) -> Value:
    """min(1, max(0, x / 6 + 1 / 2))."""
    return unary(g, "HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _within(g: Graph, x: Value) -> Value:
    """1 where -3 < x < 3, else 0: where a hard sigmoid rises."""
    return unary(g, "HardSigmoid", unary(g, "Abs", x), alpha=-1e38, beta=3e38)


@rule(aten.hardsigmoid_backward.default)
def _hardsigmoid_backward(g: Graph, out: Spec, grad: Value, x: Value) -> Value:
    return mul(g, grad, mul(g, _within(g, x), 1 / 6))


@rule(aten.hardswish.default)
def _hardswish(g: Graph, out: Spec, x: Value) -> Value:
    return mul(g, x, _hardsigmoid(g, out, x))


@rule(aten.hardswish_backward.default)
def _hardswish_backward(g: Graph, out: Spec, grad: Value, x: Value) -> Value:
    rise = mul(g, mul(g, x, _within(g, x)), 1 / 6)
    return mul(g, grad, add(g, _hardsigmoid(g, out, x), rise))


@rule(aten.hardshrink_backward.default, aten.softshrink_backward.default)
def _shrink_backward(g: Graph, out: Spec, grad: Value, x: Value, bound: float) -> Value:
    size = unary(g, "Abs", x)
    past = g.node("Greater", size, g.constant(bound, x.dtype), shape=x.shape, dtype=torch.bool)
    return mul(g, grad, cast(g, past, out.dtype))
