"""Padding with values of the border, windows along an axis, and their gradients."""

# ruff: noqa: ARG001, PLR0917 -- a rule takes the arguments of its ATen operator, in order

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.layout import concat, flip, pad_axis, slice_axis, spaced
from tools.export.rules.registry import Unsupported, rule

aten: Any = torch.ops.aten


def _borders(op: str, mode: str) -> None:
    """Register padding with values of the border: "reflect" mirrors them, "edge" repeats them."""

    def lower(g: Graph, out: Spec, a: Value, pads: Sequence[int]) -> Value:
        if min(pads) < 0:
            raise Unsupported(f"padding by {list(pads)}; crop with slices")
        free = [0] * (len(a.shape) - len(pads) // 2)
        ends = g.ints([*free, *pads[-2::-2], *free, *pads[::-2]])
        return a.node("Pad", ends, shape=out.shape, mode=mode)

    def backward(g: Graph, out: Spec, grad: Value, a: Value, pads: Sequence[int]) -> Value:
        for number in range(len(pads) // 2):
            axis = len(a.shape) - 1 - number
            grad = _folded(grad, axis, pads[2 * number], pads[2 * number + 1], mode)
        return grad

    for axes in (1, 2, 3):
        rule(getattr(aten, f"{op}_pad{axes}d").default)(lower)
        rule(getattr(aten, f"{op}_pad{axes}d_backward").default)(backward)


def _folded(grad: Value, axis: int, before: int, after: int, mode: str) -> Value:
    """The gradient along one axis: that of each border is added to that of the values it shows."""
    length = grad.shape[axis] - before - after
    mirrors = mode == "reflect"
    ends = [  # start and stop of each border, and the first place of the values that it shows
        (0, before, 1 if mirrors else 0),
        (before + length, grad.shape[axis], length - 1 - (after if mirrors else 0)),
    ]
    total = slice_axis(grad, axis, before, before + length)
    for start, stop, offset in ends:
        if start == stop:
            continue
        part = slice_axis(grad, axis, start, stop)
        part = flip(part, [axis]) if mirrors else part.sum([axis], keep=True)
        total += pad_axis(part, axis, offset, length - offset - part.shape[axis])
    return total


_borders("reflection", "reflect")
_borders("replication", "edge")


@rule(aten.unfold.default, aten.unfold_copy.default)
def _unfold(g: Graph, out: Spec, a: Value, axis: int, size: int, step: int) -> Value:
    axis %= len(a.shape)
    last = (out.shape[axis] - 1) * step + 1
    parts = [slice_axis(a, axis, k, k + last, step) for k in range(size)]
    return concat([part.reshape((*part.shape, 1)) for part in parts], len(a.shape))


@rule(aten.unfold_backward.default)
def _unfold_backward(
    g: Graph, out: Spec, grad: Value, sizes: Sequence[int], axis: int, size: int, step: int
) -> Value:
    axis %= len(sizes)
    zeros = g.constant(0.0, grad.dtype).expand(sizes)
    columns = [slice_axis(grad, len(sizes), k, k + 1) for k in range(size)]
    placed = [
        spaced(zeros, column.reshape(grad.shape[:-1]), axis, k, step)
        for k, column in enumerate(columns)
    ]
    return functools.reduce(operator.add, placed)
