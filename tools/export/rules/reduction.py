"""Sums, means, norms, extremes, matrix products."""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec
from tools.export.rules.elementwise import add, binary, cast, mul, sub, unary
from tools.export.rules.layout import reshape
from tools.export.rules.registry import Unsupported, rule

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


def _arg(op: str, operator: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value, axis: int | None = None, keep: bool = False) -> Value:
        if axis is None:
            a, axis = reshape(g, a, (math.prod(a.shape),)), 0
        return g.node(
            op, a, shape=out.shape, dtype=torch.int64, axis=axis % len(a.shape), keepdims=int(keep)
        )

    rule(operator)(lower)


_arg("ArgMax", aten.argmax.default)
_arg("ArgMin", aten.argmin.default)


def _quantifier(op: str, *operators: Any) -> None:
    def lower(
        g: Graph, out: Spec, a: Value, axes: Sequence[int] | int | None = None, keep: bool = False
    ) -> Value:
        chosen = [axes] if isinstance(axes, int) else list(axes or ())
        truth = cast(g, cast(g, a, torch.bool), torch.int32)
        return cast(g, reduce(g, op, truth, chosen, keep=keep), torch.bool)

    rule(*operators)(lower)


_quantifier("ReduceMax", aten.any.dim, aten.any.dims, aten.any.default)
_quantifier("ReduceMin", aten.all.dim, aten.all.dims, aten.all.default)


@rule(aten.cumsum.default)
def _cumsum(g: Graph, out: Spec, a: Value, axis: int, **_: Any) -> Value:
    number = g.constant(axis % len(a.shape), torch.int64)
    return g.node("CumSum", cast(g, a, out.dtype), number, shape=out.shape, dtype=out.dtype)


@rule(aten.linalg_vector_norm.default)
def _norm(
    g: Graph, out: Spec, a: Value, order: float = 2, axes: Sequence[int] | None = None,
    keep: bool = False, **_: Any,
) -> Value:  # fmt: skip
    a, axes = cast(g, a, out.dtype), axes or ()
    if order == 2:
        return unary(g, "Sqrt", reduce(g, "ReduceSum", mul(g, a, a), axes, keep=keep))
    size = unary(g, "Abs", a)
    if math.isinf(order):
        return reduce(g, "ReduceMax" if order > 0 else "ReduceMin", size, axes, keep=keep)
    if order == 1:
        return reduce(g, "ReduceSum", size, axes, keep=keep)
    if order == 0:
        raise Unsupported("a norm of order 0, which has no gradient; use order 1 or 2")
    power = binary(g, "Pow", size, g.constant(order, out.dtype))
    total = reduce(g, "ReduceSum", power, axes, keep=keep)
    return binary(g, "Pow", total, g.constant(1 / order, out.dtype))


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


def matmul(
    g: Graph, a: Value, b: Value, *, left: bool = False, right: bool = False, alpha: float = 1.0
) -> Value:
    """Alpha * a b over the last two axes, with the left or the right factor transposed or not.

    A factor that is a transposed matrix is read as it lies.
    """
    a, left = _as_it_lies(g, a, turned=left)
    b, right = _as_it_lies(g, b, turned=right)
    rows = a.shape[-1] if left else a.shape[-2]
    columns = b.shape[-2] if right else b.shape[-1]
    free = max(a.shape[:-2], b.shape[:-2], key=len)
    shape = (*free, rows, columns)
    if not left and not right and alpha == 1:
        return g.node("MatMul", a, b, shape=shape, dtype=a.dtype)
    return g.node(
        "FusedMatMul", a, b, shape=shape, dtype=a.dtype, transA=int(left), transB=int(right),
        alpha=float(alpha),
    )  # fmt: skip


def _as_it_lies(g: Graph, a: Value, *, turned: bool) -> tuple[Value, bool]:
    maker = g.maker(a)
    rank = len(a.shape)
    last = (*range(rank - 2), rank - 1, rank - 2)
    if maker is None or maker.op != "Transpose" or maker.attribute("perm") != last:
        return a, turned
    return g.value(maker.inputs[0]), not turned


def outer(g: Graph, a: Value, b: Value, alpha: float = 1.0) -> Value:
    """(N, ..., A, L), (N, ..., B, L) -> (..., A, B): alpha * the sum over N and L of products.

    ONNX Runtime transposes the right factor as it reads it, so that the one with fewer rows goes
    there; this is the faster of two ways.
    """
    if a.shape[-2] < b.shape[-2]:
        whole = outer(g, b, a, alpha)
        rank = len(whole.shape)
        shape = (*whole.shape[:-2], whole.shape[-1], whole.shape[-2])
        order = [*range(rank - 2), rank - 1, rank - 2]
        return g.node("Transpose", whole, shape=shape, dtype=a.dtype, perm=order)
    return reduce(g, "ReduceSum", matmul(g, a, b, right=True, alpha=alpha), [0])


@rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(g: Graph, out: Spec, a: Value, b: Value) -> Value:
    # Vectors as matrices: onnxruntime 1.31 takes a transposed matrix times a vector for another
    # product when it fuses the two nodes.
    left = reshape(g, a, (1, a.shape[0])) if len(a.shape) == 1 else a
    right = reshape(g, b, (b.shape[0], 1)) if len(b.shape) == 1 else b
    return reshape(g, matmul(g, left, right), out.shape)


@rule(aten.addmm.default)
def _addmm(
    g: Graph, out: Spec, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    a, left = _as_it_lies(g, a, turned=False)
    b, right = _as_it_lies(g, b, turned=False)
    return g.node(
        "Gemm", a, b, c, shape=out.shape, dtype=out.dtype, alpha=float(alpha), beta=float(beta),
        transA=int(left), transB=int(right),
    )  # fmt: skip


@rule(aten.baddbmm.default)
def _baddbmm(
    g: Graph, out: Spec, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    product = matmul(g, a, b)
    return add(g, mul(g, product, float(alpha)), mul(g, c, float(beta)))
