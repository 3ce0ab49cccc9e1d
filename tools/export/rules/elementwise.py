"""Elementwise operators, which broadcast: arithmetic, comparisons, functions, constants."""

# ruff: noqa: ARG001 -- a rule takes the arguments of its ATen operator, in order

import math
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Operand, Value, binary
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


def _operand(g: Graph, value: Operand, dtype: torch.dtype) -> Value:
    """A tensor or a Python number as a value of the type."""
    return value.cast(dtype) if isinstance(value, Value) else g.constant(value, dtype)


_ON_BOOLEANS = {"Add": "Or", "Max": "Or", "Mul": "And", "Min": "And"}


def _arithmetic(op: str, *operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Operand, b: Operand, alpha: float = 1) -> Value:
        left, right = _operand(g, a, out.dtype), _operand(g, b, out.dtype)
        if alpha != 1:
            right *= alpha
        return binary(_ON_BOOLEANS.get(op, op) if out.dtype == torch.bool else op, left, right)

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
    base = a.cast(out.dtype)
    if exponent == 2:
        return base * base
    return base**exponent


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
        left, right = _operand(g, a, dtype), _operand(g, b, dtype)
        result = left.node(op, right, shape=out.shape, dtype=torch.bool)
        return result.node("Not") if negate else result

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
        left, right = a.cast(torch.bool), b.cast(torch.bool)
        return left.node(op, right, shape=out.shape, dtype=torch.bool)

    rule(*operators)(lower)


_logical("And", aten.logical_and.default, aten.bitwise_and.Tensor)
_logical("Or", aten.logical_or.default, aten.bitwise_or.Tensor)
_logical("Xor", aten.logical_xor.default, aten.bitwise_xor.Tensor)


@rule(aten.logical_not.default, aten.bitwise_not.default)
def _not(g: Graph, out: Spec, a: Value) -> Value:
    if out.dtype != torch.bool:
        raise Unsupported("bitwise arithmetic on integers; use booleans")
    return a.cast(torch.bool).node("Not")


def _function(op: str, *operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value) -> Value:
        return a.cast(out.dtype).node(op)

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
        return (a.cast(out.dtype) * before).node(op) * after

    rule(operator)(lower)


_scaled("Log", aten.log2.default, 1, 1 / math.log(2))
_scaled("Log", aten.log10.default, 1, 1 / math.log(10))
_scaled("Exp", aten.exp2.default, math.log(2), 1)


@rule(aten.erfc.default)
def _erfc(g: Graph, out: Spec, a: Value) -> Value:
    return 1 - a.cast(out.dtype).node("Erf")


@rule(aten.isnan.default)
def _isnan(g: Graph, out: Spec, a: Value) -> Value:
    return a.node("IsNaN", dtype=torch.bool)


@rule(aten.isinf.default)
def _isinf(g: Graph, out: Spec, a: Value) -> Value:
    return a.node("IsInf", dtype=torch.bool)


@rule(aten.trunc.default)
def _trunc(g: Graph, out: Spec, a: Value) -> Value:
    return a.node("Sign") * abs(a).node("Floor")


@rule(aten.fmod.Scalar, aten.fmod.Tensor)
def _fmod(g: Graph, out: Spec, a: Operand, b: Operand) -> Value:
    left, right = _operand(g, a, out.dtype), _operand(g, b, out.dtype)
    return left.node("Mod", right, shape=out.shape, dtype=out.dtype, fmod=1)


@rule(aten.remainder.Scalar, aten.remainder.Tensor)
def _remainder(g: Graph, out: Spec, a: Operand, b: Operand) -> Value:
    left, right = _operand(g, a, out.dtype), _operand(g, b, out.dtype)
    if not out.dtype.is_floating_point:
        return left.node("Mod", right, shape=out.shape, dtype=out.dtype)
    return left - (left / right).node("Floor") * right


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_rounded(
    g: Graph, out: Spec, a: Operand, b: Operand, *, rounding_mode: str | None = None
) -> Value:
    left, right = _operand(g, a, out.dtype), _operand(g, b, out.dtype)
    if rounding_mode == "floor" and not out.dtype.is_floating_point:
        left = left - _remainder(g, out, left, right)  # ONNX's quotient rounds towards 0
    quotient = left / right
    if rounding_mode is None or not out.dtype.is_floating_point:
        return quotient
    if rounding_mode == "floor":
        return quotient.node("Floor")
    return _trunc(g, out, quotient)


@rule(aten.rsqrt.default)
def _rsqrt(g: Graph, out: Spec, a: Value) -> Value:
    return a.cast(out.dtype).node("Sqrt").node("Reciprocal")


@rule(aten.log1p.default)
def _log1p(g: Graph, out: Spec, a: Value) -> Value:
    # log(1 + a) loses the digits of a small a. With u = 1 + a, rounded, log(u) * a / (u - 1) does
    # not (Kahan). Where u == 1 the result is a itself.
    one = g.constant(1, out.dtype)
    u = a + one
    exact = u.equals(one)
    divisor = exact.where(one, u - one)
    return exact.where(a, u.node("Log") * (a / divisor))


@rule(aten.expm1.default)
def _expm1(g: Graph, out: Spec, a: Value) -> Value:
    # exp(a) - 1 = tanh(a / 2) * (exp(a) + 1), without the cancellation.
    return (a * 0.5).node("Tanh") * (a.node("Exp") + 1)


@rule(aten.hardtanh.default)
def _hardtanh(g: Graph, out: Spec, a: Value, low: float = -1, high: float = 1) -> Value:
    return _clamp(g, out, a, low, high)


@rule(aten.clamp.default)
def _clamp(
    g: Graph, out: Spec, a: Value, low: float | None = None, high: float | None = None
) -> Value:
    bounds = [None if b is None else g.constant(b, out.dtype) for b in (low, high)]
    return a.cast(out.dtype).node("Clip", *bounds)


@rule(aten.clamp.Tensor)
def _clamp_between(
    g: Graph, out: Spec, a: Value, low: Value | None = None, high: Value | None = None
) -> Value:
    value = a.cast(out.dtype)
    if low is not None:
        value = binary("Max", value, low.cast(out.dtype))
    return value if high is None else binary("Min", value, high.cast(out.dtype))


@rule(aten.where.self)
def _where(g: Graph, out: Spec, condition: Value, a: Operand, b: Operand) -> Value:
    left, right = _operand(g, a, out.dtype), _operand(g, b, out.dtype)
    return condition.where(left, right)


@rule(aten.threshold_backward.default)
def _relu_backward(g: Graph, out: Spec, grad: Value, result: Value, threshold: float) -> Value:
    maker = result.maker
    if threshold == 0 and out.dtype == torch.float32 and maker is not None and maker.op == "Relu":
        # min(1, 3e38 y) is 1 for every y > 0 but a denormal one: the mask in one pass, where a
        # comparison and a cast take two, `Sign` is not vectorized and `Where` takes three.
        return grad * result.node("HardSigmoid", alpha=3e38, beta=0.0)
    return grad * (result > threshold).cast(out.dtype)


@rule(aten._to_copy.default)  # noqa: SLF001
def _to_copy(g: Graph, out: Spec, a: Value, **_: Any) -> Value:
    return a.cast(out.dtype)


def _same(*operators: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value, **_: Any) -> Value:
        return a

    rule(*operators)(lower)


_same(aten.clone.default, aten.alias.default, aten.alias_copy.default)
_same(aten.detach.default, aten.detach_copy.default)
_same(aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.contiguous.default)


@rule(aten.copy.default, aten.copy_.default)
def _copy(g: Graph, out: Spec, target: Value, source: Value, *_: Any) -> Value:
    return source.cast(out.dtype).expand(out.shape)


def _filled(g: Graph, out: Spec, number: float) -> Value:
    return g.constant(number, out.dtype).expand(out.shape)


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
