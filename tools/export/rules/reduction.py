"""Sums, means, extremes, matrix products, softmax."""

# ruff: noqa: ARG001 -- a rule takes the arguments of its ATen operator, in order

from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graph import Graph, Value
from tools.export.program import Spec
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
    there; of two ways this is up to a third faster.
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
    if len(a.shape) == 1 or len(b.shape) == 1:
        return g.node("MatMul", a, b, shape=out.shape, dtype=out.dtype)
    return matmul(g, a, b)


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


@rule(aten._softmax.default)  # noqa: SLF001
def _softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return g.node("Softmax", a, shape=out.shape, axis=axis % len(a.shape))


@rule(aten._log_softmax.default)  # noqa: SLF001
def _log_softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return g.node("LogSoftmax", a, shape=out.shape, axis=axis % len(a.shape))
