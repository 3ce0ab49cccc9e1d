"""Softmax, and scaled dot-product attention with its gradient.

PyTorch's CPU kernel of attention ("flash") keeps the logarithm of each softmax's denominator for
its gradient. Here the gradient asks for the softmax again, which the graph has already.
"""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import math
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value, binary, matmul
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


@rule(aten._softmax.default)  # noqa: SLF001
def _softmax_rule(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return _softmax(a, axis)


@rule(aten._log_softmax.default)  # noqa: SLF001
def _log_softmax(g: Graph, out: Spec, a: Value, axis: int, half_to_float: bool) -> Value:
    return a.node("LogSoftmax", axis=axis % len(a.shape))


@rule(aten._safe_softmax.default)  # noqa: SLF001
def _safe_softmax_rule(g: Graph, out: Spec, a: Value, axis: int, *_: Any, **__: Any) -> Value:
    return _safe_softmax(a, axis)


def _softmax(a: Value, axis: int) -> Value:
    return a.node("Softmax", axis=axis % len(a.shape))


def _safe_softmax(a: Value, axis: int) -> Value:
    """Softmax that is 0 where a whole row is masked, that is -inf."""
    lowest = float(torch.finfo(a.dtype).min)
    unmasked = a.reduce("ReduceMax", [axis], keep=True) > lowest
    # -inf less -inf is no number; from the lowest one, exp comes to the same 0 in every other row.
    bounded = binary("Max", a, a.graph.constant(lowest, a.dtype))
    return _softmax(bounded, axis) * unmasked.cast(a.dtype)


def _weights(query: Value, key: Value, causal: bool, mask: Value | None, scale: float) -> Value:
    """P = softmax(scale * Q K^T + mask) of (N, heads, L, E) and (N, heads, S, E)."""
    if query.shape[:-2] != key.shape[:-2]:
        raise Unsupported(
            "attention with fewer heads of keys than of queries; repeat the keys and the values "
            "with repeat_interleave"
        )
    g, rows, columns = query.graph, query.shape[-2], key.shape[-2]
    scores = matmul(query, key.T, alpha=scale)
    if causal:
        above = [[0 if s <= t else -math.inf for s in range(columns)] for t in range(rows)]
        return _softmax(scores + g.constant(above, scores.dtype), -1)
    if mask is None:
        return _softmax(scores, -1)
    if mask.dtype == torch.bool:
        mask = mask.where(*(g.constant(number, scores.dtype) for number in (0.0, -math.inf)))
    return _safe_softmax(scores + mask, -1)


def _scale(query: Value, scale: float | None) -> float:
    """The scale of the scores; if none is given, 1 / sqrt(E)."""
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)  # noqa: SLF001
def _attention(
    g: Graph, out: tuple[Spec, ...], query: Value, key: Value, value: Value, dropout: float = 0.0,
    causal: bool = False, *, attn_mask: Value | None = None, scale: float | None = None,
) -> tuple[Value | None, ...]:  # fmt: skip
    """The output; the logarithms that PyTorch keeps for its gradient are not needed here."""
    if dropout:
        raise Unsupported("dropout of attention: a compiled step has no random numbers; set p=0")
    weights = _weights(query, key, causal, attn_mask, _scale(query, scale))
    return weights @ value, None


@rule(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)  # noqa: SLF001
def _attention_backward(
    g: Graph, out: tuple[Spec, ...], grad: Value, query: Value, key: Value, value: Value,
    result: Value, logarithms: None, dropout: float, causal: bool, *,
    attn_mask: Value | None = None, scale: float | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    # With P = softmax(scale Q K^T), Y = P V:  dV = P^T dY,  dP = dY V^T,
    # dS = P * (dP - rowsum(dP * P)), where rowsum(dP * P) = rowsum(dY * Y) is the smaller sum,
    # dQ = scale dS K,  dK = scale dS^T Q.
    factor = _scale(query, scale)
    weights = _weights(query, key, causal, attn_mask, factor)
    common = (grad * result).sum([-1], keep=True)
    slopes = weights * (grad @ value.T - common)
    return (
        matmul(slopes, key, alpha=factor),
        matmul(slopes.T, query, alpha=factor),
        weights.T @ grad,
    )
