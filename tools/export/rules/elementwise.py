"""Arithmetic, comparisons and activations: one value in, one value out, with broadcasting."""

# ruff: noqa: ARG001 -- a rule takes the arguments of its ATen operator, in order

import math
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec, onnx_type
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten
Operand = Value | float | int | bool


def cast(g: Graph, value: Value, dtype: torch.dtype) -> Value:
    """The value in another type."""
    if value.dtype == dtype:
        return value
    return g.node("Cast", value, shape=value.shape, dtype=dtype, to=onnx_type(dtype))


def operand(g: Graph, value: Operand, dtype: torch.dtype) -> Value:
    """A tensor or a Python number as a value of the type."""
    return cast(g, value, dtype) if isinstance(value, Value) else g.constant(value, dtype)


def binary(g: Graph, op: str, a: Value, b: Value) -> Value:
    """An arithmetic node on two values of one type, done before they are expanded."""
    left, right = g.small(a), g.small(b)
    small = g.node(op, left, right, shape=_broadcast(left, right), dtype=a.dtype)
    return g.expand(small, _broadcast(a, b))


def _broadcast(a: Spec, b: Spec) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(a.shape, b.shape))  # type: ignore[no-untyped-call]


def mul(g: Graph, a: Value, b: Operand) -> Value:
    """Product."""
    return binary(g, "Mul", a, operand(g, b, a.dtype))


def add(g: Graph, a: Value, b: Operand) -> Value:
    """Sum."""
    return binary(g, "Add", a, operand(g, b, a.dtype))


def sub(g: Graph, a: Value, b: Operand) -> Value:
    """Difference."""
    return binary(g, "Sub", a, operand(g, b, a.dtype))


def div(g: Graph, a: Value, b: Operand) -> Value:
    """Quotient."""
    return binary(g, "Div", a, operand(g, b, a.dtype))


def unary(g: Graph, op: str, a: Value, **attributes: Any) -> Value:
    """A node that keeps shape and type."""
    return g.node(op, a, shape=a.shape, dtype=a.dtype, **attributes)


_OF_BOOLEANS = {"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And"}


def _arithmetic(op: str, *operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Operand, b: Operand, alpha: float = 1) -> Value:
        left, right = operand(g, a, out.dtype), operand(g, b, out.dtype)
        if alpha != 1:
            right = mul(g, right, alpha)
        return binary(g, _OF_BOOLEANS.get(op, op) if out.dtype == torch.bool else op, left, right)

    rule(*operators)(lower)


_arithmetic("Add", aten.add.Tensor, aten.add.Scalar)
_arithmetic("Sub", aten.sub.Tensor, aten.sub.Scalar)
_arithmetic("Mul", aten.mul.Tensor, aten.mul.Scalar)
_arithmetic("Div", aten.div.Tensor, aten.div.Scalar)
_arithmetic("Pow", aten.pow.Tensor_Tensor, aten.pow.Scalar)
_arithmetic("Max", aten.maximum.default)
_arithmetic("Min", aten.minimum.default)


@rule(aten.pow.Tensor_Scalar)
def _power(g: Graph, out: Spec, a: Value, exponent: float) -> Value:
    base = cast(g, a, out.dtype)
    if exponent == 2:
        return mul(g, base, base)
    return g.node("Pow", base, g.constant(exponent, out.dtype), shape=out.shape, dtype=out.dtype)


def _common_type(a: Operand, b: Operand) -> torch.dtype:
    if isinstance(a, Value) and isinstance(b, Value):
        return torch.promote_types(a.dtype, b.dtype)
    tensor, number = (a, b) if isinstance(a, Value) else (b, a)
    if not isinstance(tensor, Value):
        raise TypeError("an operator on two numbers")
    if isinstance(number, float) and not tensor.dtype.is_floating_point:
        return torch.float32
    return torch.int64 if tensor.dtype == torch.bool else tensor.dtype


def _comparison(op: str, name: str, *, negate: bool = False) -> None:
    def lower(g: Graph, out: Spec, a: Operand, b: Operand) -> Value:
        dtype = _common_type(a, b)
        left, right = operand(g, a, dtype), operand(g, b, dtype)
        result = g.node(op, left, right, shape=out.shape, dtype=torch.bool)
        return unary(g, "Not", result) if negate else result

    rule(getattr(aten, name).Tensor, getattr(aten, name).Scalar)(lower)


_comparison("Equal", "eq")
_comparison("Equal", "ne", negate=True)
_comparison("Greater", "gt")
_comparison("GreaterOrEqual", "ge")
_comparison("Less", "lt")
_comparison("LessOrEqual", "le")


def _logical(op: str, *operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value, b: Value) -> Value:
        if out.dtype != torch.bool:
            raise Unsupported("bitwise arithmetic on integers; use booleans")
        left, right = cast(g, a, torch.bool), cast(g, b, torch.bool)
        return g.node(op, left, right, shape=out.shape, dtype=torch.bool)

    rule(*operators)(lower)


_logical("And", aten.logical_and.default, aten.bitwise_and.Tensor)
_logical("Or", aten.logical_or.default, aten.bitwise_or.Tensor)
_logical("Xor", aten.logical_xor.default, aten.bitwise_xor.Tensor)


@rule(aten.logical_not.default, aten.bitwise_not.default)
def _not(g: Graph, out: Spec, a: Value) -> Value:
    if out.dtype != torch.bool:
        raise Unsupported("bitwise arithmetic on integers; use booleans")
    return unary(g, "Not", cast(g, a, torch.bool))


def _function(op: str, *operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value) -> Value:
        return unary(g, op, cast(g, a, out.dtype))

    rule(*operators)(lower)


for _op, _name in {
    "Neg": "neg",
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Reciprocal": "reciprocal",
    "Abs": "abs",
    "Sign": "sign",
    "Sin": "sin",
    "Cos": "cos",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Erf": "erf",
    "Relu": "relu",
    "Floor": "floor",
    "Ceil": "ceil",
    "Round": "round",
    "Tan": "tan",
    "Asin": "asin",
    "Acos": "acos",
    "Atan": "atan",
    "Sinh": "sinh",
    "Cosh": "cosh",
    "Asinh": "asinh",
    "Acosh": "acosh",
    "Atanh": "atanh",
}.items():
    _function(_op, getattr(aten, _name).default)


def _scaled(op: str, operator: Any, before: float, after: float) -> None:
    def lower(g: Graph, out: Spec, a: Value) -> Value:
        return mul(g, unary(g, op, mul(g, cast(g, a, out.dtype), before)), after)

    rule(operator)(lower)


_scaled("Log", aten.log2.default, 1, 1 / math.log(2))
_scaled("Log", aten.log10.default, 1, 1 / math.log(10))
_scaled("Exp", aten.exp2.default, math.log(2), 1)


@rule(aten.erfc.default)
def _erfc(g: Graph, out: Spec, a: Value) -> Value:
    return sub(g, g.constant(1.0, out.dtype), unary(g, "Erf", cast(g, a, out.dtype)))


@rule(aten.isnan.default)
def _isnan(g: Graph, out: Spec, a: Value) -> Value:
    return g.node("IsNaN", a, shape=out.shape, dtype=torch.bool)


@rule(aten.isinf.default)
def _isinf(g: Graph, out: Spec, a: Value) -> Value:
    return g.node("IsInf", a, shape=out.shape, dtype=torch.bool)


@rule(aten.trunc.default)
def _trunc(g: Graph, out: Spec, a: Value) -> Value:
    return mul(g, unary(g, "Sign", a), unary(g, "Floor", unary(g, "Abs", a)))


@rule(aten.fmod.Scalar, aten.fmod.Tensor)
def _fmod(g: Graph, out: Spec, a: Operand, b: Operand) -> Value:
    left, right = operand(g, a, out.dtype), operand(g, b, out.dtype)
    return g.node("Mod", left, right, shape=out.shape, dtype=out.dtype, fmod=1)


@rule(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(g: Graph, out: Spec, a: Operand, b: Operand) -> Value:
    left, right = operand(g, a, out.dtype), operand(g, b, out.dtype)
    if not out.dtype.is_floating_point:
        return g.node("Mod", left, right, shape=out.shape, dtype=out.dtype)
    return sub(g, left, mul(g, unary(g, "Floor", div(g, left, right)), right))


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_rounded(
    g: Graph, out: Spec, a: Operand, b: Operand, *, rounding_mode: str | None = None
) -> Value:
    left, right = operand(g, a, out.dtype), operand(g, b, out.dtype)
    if rounding_mode == "floor" and not out.dtype.is_floating_point:
        left = sub(g, left, _remainder(g, out, left, right))  # ONNX's quotient rounds towards 0
    quotient = div(g, left, right)
    if rounding_mode is None or not out.dtype.is_floating_point:
        return quotient
    if rounding_mode == "floor":
        return unary(g, "Floor", quotient)
    return _trunc(g, out, quotient)


@rule(aten.rsqrt.default)
def rsqrt(g: Graph, out: Spec, a: Value) -> Value:
    """1 / sqrt(a)."""
    return unary(g, "Reciprocal", unary(g, "Sqrt", cast(g, a, out.dtype)))


@rule(aten.log1p.default)
def _log1p(g: Graph, out: Spec, a: Value) -> Value:
    # log(1 + a) alone loses all of a small a. With u = 1 + a rounded, log(u) * a / (u - 1) does
    # not (Kahan); where u == 1 the answer is a itself.
    one = g.constant(1.0, out.dtype)
    u = add(g, a, one)
    exact = g.node("Equal", u, one, shape=out.shape, dtype=torch.bool)
    rest = sub(g, u, one)
    safe = g.node("Where", exact, one, rest, shape=out.shape, dtype=out.dtype)
    scaled = mul(g, unary(g, "Log", u), div(g, a, safe))
    return g.node("Where", exact, a, scaled, shape=out.shape, dtype=out.dtype)


@rule(aten.expm1.default)
def _expm1(g: Graph, out: Spec, a: Value) -> Value:
    # exp(a) - 1 = tanh(a / 2) * (exp(a) + 1), without the cancellation.
    half = unary(g, "Tanh", mul(g, a, 0.5))
    return mul(g, half, add(g, unary(g, "Exp", a), 1.0))


@rule(aten.hardtanh.default)
def _hardtanh(g: Graph, out: Spec, a: Value, low: float = -1, high: float = 1) -> Value:
    return _clamp(g, out, a, low, high)


@rule(aten.clamp.default)
def _clamp(
    g: Graph, out: Spec, a: Value, low: float | None = None, high: float | None = None
) -> Value:
    bounds = [None if b is None else g.constant(b, out.dtype) for b in (low, high)]
    return g.node("Clip", cast(g, a, out.dtype), *bounds, shape=out.shape, dtype=out.dtype)


@rule(aten.clamp.Tensor)
def _clamp_between(
    g: Graph, out: Spec, a: Value, low: Value | None = None, high: Value | None = None
) -> Value:
    value = cast(g, a, out.dtype)
    if low is not None:
        value = binary(g, "Max", value, cast(g, low, out.dtype))
    return value if high is None else binary(g, "Min", value, cast(g, high, out.dtype))


@rule(aten.where.self)
def _where(g: Graph, out: Spec, condition: Value, a: Operand, b: Operand) -> Value:
    left, right = operand(g, a, out.dtype), operand(g, b, out.dtype)
    return g.node("Where", condition, left, right, shape=out.shape, dtype=out.dtype)


@rule(aten.threshold_backward.default)
def _relu_backward(g: Graph, out: Spec, grad: Value, result: Value, threshold: float) -> Value:
    maker = g.maker(result)
    if threshold == 0 and out.dtype == torch.float32 and maker is not None and maker.op == "Relu":
        # min(1, 3e38 y) is 1 for every y > 0 but a denormal one: the mask in one pass, where a
        # comparison and a cast take two, `Sign` is not vectorized and `Where` takes three.
        return mul(g, grad, unary(g, "HardSigmoid", result, alpha=3e38, beta=0.0))
    positive = g.node(
        "Greater", result, g.constant(threshold, out.dtype), shape=result.shape, dtype=torch.bool
    )
    return mul(g, grad, cast(g, positive, out.dtype))


@rule(aten._to_copy.default)  # noqa: SLF001
def _to_copy(g: Graph, out: Spec, a: Value, **_: Any) -> Value:
    return cast(g, a, out.dtype)


def _same(*operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value, **_: Any) -> Value:
        return a

    rule(*operators)(lower)


_same(aten.clone.default, aten.alias.default, aten.alias_copy.default)
_same(aten.detach.default, aten.detach_copy.default)
_same(aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.contiguous.default)


@rule(aten.copy.default, aten.copy_.default)
def _copy(g: Graph, out: Spec, target: Value, source: Value, *_: Any) -> Value:
    return g.expand(cast(g, source, out.dtype), out.shape)


def _filled(g: Graph, out: Spec, number: float) -> Value:
    scalar = g.constant(number, out.dtype)
    return g.expand(scalar, out.shape)


@rule(aten.full.default, aten.full_like.default)
def _full(g: Graph, out: Spec, _: Any, number: float, **__: Any) -> Value:
    return _filled(g, out, number)


@rule(aten.scalar_tensor.default)
def _scalar_tensor(g: Graph, out: Spec, number: float, **_: Any) -> Value:
    return _filled(g, out, number)


@rule(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
def _zeros(g: Graph, out: Spec, *_: Any, **__: Any) -> Value:
    return _filled(g, out, 0)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(g: Graph, out: Spec, *_: Any, **__: Any) -> Value:
    return _filled(g, out, 1)


@rule(aten.arange.start_step)
def _arange(g: Graph, out: Spec, start: float, end: float, step: float = 1, **_: Any) -> Value:
    values = torch.arange(start, end, step, dtype=out.dtype)
    return g.constant(values.numpy(), out.dtype)
