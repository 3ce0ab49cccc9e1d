"""Softmax, and scaled dot-product attention with its gradient.

PyTorch's CPU kernel of attention ("flash") keeps the logarithm of each softmax's denominator for
its gradient. Here the gradient asks for the softmax again, which the graph has already.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from typing import Any

import torch

from tools.export.graphs.graph import Graph, Value
from tools.export.graphs.program import Spec
from tools.export.rules.elementwise import add, binary, cast, mul, operand, sub
from tools.export.rules.reduction import matmul, reduce
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


@rule(aten._softmax.default)  # noqa: SLF001
def _softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return g.node("Softmax", a, shape=out.shape, dtype=out.dtype, axis=axis % len(a.shape))


@rule(aten._log_softmax.default)  # noqa: SLF001
def _log_softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return g.node("LogSoftmax", a, shape=out.shape, dtype=out.dtype, axis=axis % len(a.shape))


@rule(aten._safe_softmax.default)  # noqa: SLF001
def _safe_softmax(g: Graph, out: Spec, a: Value, axis: int, *_: Any, **__: Any) -> Value:
    """Softmax that is 0 where a whole row is masked, that is -inf."""
    lowest = float(torch.finfo(out.dtype).min)
    largest = reduce(g, "ReduceMax", a, [axis], keep=True)
    seen = g.node(
        "Greater", largest, g.constant(lowest, out.dtype), shape=largest.shape, dtype=torch.bool
    )
    # -inf less -inf is no number; from the lowest one, exp comes to the same 0 in every other row.
    bounded = binary(g, "Max", a, g.constant(lowest, out.dtype))
    chances = g.node("Softmax", bounded, shape=out.shape, dtype=out.dtype, axis=axis % len(a.shape))
    return mul(g, chances, cast(g, seen, out.dtype))


def _chances(
    g: Graph, query: Value, key: Value, causal: bool, mask: Value | None, scale: float | None
) -> tuple[Value, float]:
    """Softmax(scale * Q K^T + mask) of (N, heads, L, E) and (N, heads, S, E), and the scale."""
    if query.shape[:-2] != key.shape[:-2]:
        raise Unsupported(
            "attention with fewer heads of keys than of queries; repeat the keys and the values "
            "with repeat_interleave"
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    rows, columns = query.shape[-2], key.shape[-2]
    scores = matmul(g, query, key, right=True, alpha=factor)
    spec = Spec(scores.shape, scores.dtype)
    if causal:
        above = [[0 if s <= t else -math.inf for s in range(columns)] for t in range(rows)]
        scores = add(g, scores, g.constant(above, spec.dtype))
        return _softmax(g, spec, scores, -1, False), factor
    if mask is None:
        return _softmax(g, spec, scores, -1, False), factor
    if mask.dtype == torch.bool:
        zero, hidden = (operand(g, number, spec.dtype) for number in (0.0, -math.inf))
        mask = g.node("Where", mask, zero, hidden, shape=mask.shape, dtype=spec.dtype)
    return _safe_softmax(g, spec, add(g, scores, mask), -1), factor


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)  # noqa: SLF001
def _attention(
    g: Graph, out: tuple[Spec, ...], query: Value, key: Value, value: Value, dropout: float = 0.0,
    causal: bool = False, *, attn_mask: Value | None = None, scale: float | None = None,
) -> tuple[Value | None, ...]:  # fmt: skip
    """The output; the logarithms that PyTorch keeps for its gradient are not needed here."""
    if dropout:
        raise Unsupported("dropout of attention: a compiled step has no random numbers; set p=0")
    return matmul(g, _chances(g, query, key, causal, attn_mask, scale)[0], value), None


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)  # noqa: SLF001
def _attention_backward(
    g: Graph, out: tuple[Spec, ...], grad: Value, query: Value, key: Value, value: Value,
    result: Value, logarithms: None, dropout: float, causal: bool, *,
    attn_mask: Value | None = None, scale: float | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    # With P = softmax(scale Q K^T), Y = P V:  dV = P^T dY,  dP = dY V^T,
    # dS = P * (dP - rowsum(dP * P)), where rowsum(dP * P) = rowsum(dY * Y) is the smaller sum,
    # dQ = scale dS K,  dK = scale dS^T Q.
    chances, factor = _chances(g, query, key, causal, attn_mask, scale)
    common = reduce(g, "ReduceSum", mul(g, grad, result), [-1], keep=True)
    slopes = mul(g, chances, sub(g, matmul(g, grad, value, right=True), common))
    return (
        matmul(g, slopes, key, alpha=factor),
        matmul(g, slopes, query, left=True, alpha=factor),
        matmul(g, chances, grad, left=True),
    )
