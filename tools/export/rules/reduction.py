"""Sums, means, extremes, matrix products, softmax."""

# ruff: noqa: ARG001 -- a rule takes the arguments of its ATen operator, in order

from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graph import Graph, Spec, Value
from tools.export.rules.elementwise import add, cast, mul, sub
from tools.export.rules.layout import reshape
from tools.export.rules.registry import rule

aten: Any = torch.ops.aten


def reduce(g: Graph, op: str, a: Value, axes: Sequence[int], *, keep: bool = False) -> Value:
    """ReduceSum, ReduceMean, ReduceMax or ReduceMin over axes (none given: over all)."""
    rank = len(a.shape)
    chosen = sorted({axis % rank for axis in axes}) if axes else list(range(rank))
    shape = [1 if i in chosen else n for i, n in enumerate(a.shape) if keep or i not in chosen]
    if not chosen:
        return a
    return g.node(op, a, g.ints(chosen), shape=shape, dtype=a.dtype, keepdims=int(keep))


def _reduction(op: str, *operators: Any) -> None:
    def lower(
        g: Graph, out: Spec, a: Value, axes: Sequence[int] | int | None = None,
        keep: bool = False, **_: Any,
    ) -> Value:  # fmt: skip
        chosen = [axes] if isinstance(axes, int) else list(axes or ())
        return reduce(g, op, cast(g, a, out.dtype), chosen, keep=keep)

    rule(*operators)(lower)


_reduction("ReduceSum", aten.sum.dim_IntList, aten.sum.default)
_reduction("ReduceMean", aten.mean.dim, aten.mean.default)
_reduction("ReduceMax", aten.amax.default, aten.max.default)
_reduction("ReduceMin", aten.amin.default, aten.min.default)


@rule(aten.argmax.default)
def _argmax(g: Graph, out: Spec, a: Value, axis: int | None = None, keep: bool = False) -> Value:
    if axis is None:
        a, axis = reshape(g, a, (-1,)), 0
    return g.node(
        "ArgMax", a, shape=out.shape, dtype=torch.int64, axis=axis % len(a.shape),
        keepdims=int(keep),
    )  # fmt: skip


@rule(aten.var.correction)
def _variance(
    g: Graph, out: Spec, a: Value, axes: Sequence[int] | None = None, *,
    correction: float | None = None, keepdim: bool = False,
) -> Value:  # fmt: skip
    return var_mean(g, (out, out), a, axes, correction=correction, keepdim=keepdim)[0]


@rule(aten.var_mean.correction)
def var_mean(
    g: Graph, out: tuple[Spec, ...], a: Value, axes: Sequence[int] | None = None, *,
    correction: float | None = None, keepdim: bool = False,
) -> tuple[Value, Value]:  # fmt: skip
    """Variance (divided by n - correction, 1 if not given) and mean, in two passes."""
    mean = reduce(g, "ReduceMean", a, axes or (), keep=True)
    distance = sub(g, a, mean)
    total = reduce(g, "ReduceSum", mul(g, distance, distance), axes or (), keep=True)
    count = 1
    for whole, left in zip(a.shape, mean.shape, strict=True):
        count *= whole // left
    divisor = count - (1 if correction is None else correction)
    variance = mul(g, total, 1.0 / divisor)
    shape = mean.shape if keepdim else out[0].shape
    return reshape(g, variance, shape), reshape(g, mean, shape)


@rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(g: Graph, out: Spec, a: Value, b: Value) -> Value:
    return g.node("MatMul", a, b, shape=out.shape, dtype=out.dtype)


@rule(aten.addmm.default)
def _addmm(
    g: Graph, out: Spec, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    return g.node("Gemm", a, b, c, shape=out.shape, alpha=float(alpha), beta=float(beta))


@rule(aten.baddbmm.default)
def _baddbmm(
    g: Graph, out: Spec, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    product = g.node("MatMul", a, b, shape=out.shape)
    return add(g, mul(g, product, float(alpha)), mul(g, c, float(beta)))


@rule(aten._softmax.default)  # noqa: SLF001
def _softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return g.node("Softmax", a, shape=out.shape, axis=axis % len(a.shape))


@rule(aten._log_softmax.default)  # noqa: SLF001
def _log_softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return g.node("LogSoftmax", a, shape=out.shape, axis=axis % len(a.shape))
