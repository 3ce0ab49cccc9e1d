"""Sums, means, norms, extremes, and matrix products."""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value, as_stored, matmul
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


def _reduction(op: str, *operators: Any) -> None:
    def lower(
        g: Graph, out: Spec, a: Value, axes: Sequence[int] | int | None = None,
        keep: bool = False, **_: Any,
    ) -> Value:  # fmt: skip
        chosen = [axes] if isinstance(axes, int) else list(axes or ())
        return a.cast(out.dtype).reduce(op, chosen, keep=keep)

    rule(*operators)(lower)


_reduction("ReduceSum", aten.sum.dim_IntList, aten.sum.default)
_reduction("ReduceMean", aten.mean.dim, aten.mean.default)
_reduction("ReduceMax", aten.amax.default, aten.max.default)
_reduction("ReduceMin", aten.amin.default, aten.min.default)


def _arg(op: str, operator: Any) -> None:
    def lower(g: Graph, out: Spec, a: Value, axis: int | None = None, keep: bool = False) -> Value:
        if axis is None:
            a, axis = a.reshape((math.prod(a.shape),)), 0
        return a.node(
            op, shape=out.shape, dtype=torch.int64, axis=axis % len(a.shape), keepdims=int(keep)
        )

    rule(operator)(lower)


_arg("ArgMax", aten.argmax.default)
_arg("ArgMin", aten.argmin.default)


def _quantifier(op: str, *operators: Any) -> None:
    def lower(
        g: Graph, out: Spec, a: Value, axes: Sequence[int] | int | None = None, keep: bool = False
    ) -> Value:
        chosen = [axes] if isinstance(axes, int) else list(axes or ())
        truth = a.cast(torch.bool).cast(torch.int32)
        return truth.reduce(op, chosen, keep=keep).cast(torch.bool)

    rule(*operators)(lower)


_quantifier("ReduceMax", aten.any.dim, aten.any.dims, aten.any.default)
_quantifier("ReduceMin", aten.all.dim, aten.all.dims, aten.all.default)


@rule(aten.cumsum.default)
def _cumsum(g: Graph, out: Spec, a: Value, axis: int, **_: Any) -> Value:
    number = g.constant(axis % len(a.shape), torch.int64)
    return a.cast(out.dtype).node("CumSum", number, shape=out.shape, dtype=out.dtype)


@rule(aten.linalg_vector_norm.default)
def _norm(
    g: Graph, out: Spec, a: Value, order: float = 2, axes: Sequence[int] | None = None,
    keep: bool = False, **_: Any,
) -> Value:  # fmt: skip
    a, axes = a.cast(out.dtype), axes or ()
    if order == 2:
        return (a * a).sum(axes, keep=keep).node("Sqrt")
    size = abs(a)
    if math.isinf(order):
        return size.reduce("ReduceMax" if order > 0 else "ReduceMin", axes, keep=keep)
    if order == 1:
        return size.sum(axes, keep=keep)
    if order == 0:
        raise Unsupported("a norm of order 0, which has no gradient; use order 1 or 2")
    return (size**order).sum(axes, keep=keep) ** (1 / order)


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
    mean = a.mean(axes or (), keep=True)
    distance = a - mean
    total = (distance * distance).sum(axes or (), keep=True)
    count = a.size // mean.size
    divisor = count - (1 if correction is None else correction)
    variance = total * (1 / divisor)
    shape = mean.shape if keepdim else out[0].shape
    return variance.reshape(shape), mean.reshape(shape)


def outer(a: Value, b: Value, alpha: float = 1.0) -> Value:
    """(N, ..., A, L), (N, ..., B, L) -> (..., A, B): alpha * the sum over N and L of products.

    ONNX Runtime transposes the right factor as it reads it. The one with fewer rows goes there,
    which is the faster of two ways.
    """
    if a.shape[-2] < b.shape[-2]:
        whole = outer(b, a, alpha)
        *stack, rows, columns = range(len(whole.shape))
        return whole.transpose([*stack, columns, rows])
    return matmul(a, b.T, alpha=alpha).sum([0])


@rule(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(g: Graph, out: Spec, a: Value, b: Value) -> Value:
    # Vectors as matrices: onnxruntime 1.31 takes a transposed matrix times a vector for another
    # product when it fuses the two nodes.
    left = a.reshape((1, a.shape[0])) if len(a.shape) == 1 else a
    right = b.reshape((b.shape[0], 1)) if len(b.shape) == 1 else b
    return (left @ right).reshape(out.shape)


@rule(aten.addmm.default)
def _addmm(
    g: Graph, out: Spec, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    left, turned_left = as_stored(a)
    right, turned_right = as_stored(b)
    return left.node(
        "Gemm", right, c, shape=out.shape, alpha=float(alpha), beta=float(beta),
        transA=int(turned_left), transB=int(turned_right),
    )  # fmt: skip


@rule(aten.baddbmm.default)
def _baddbmm(
    g: Graph, out: Spec, c: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1
) -> Value:
    return (a @ b) * alpha + c * beta
