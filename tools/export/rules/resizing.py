"""Resizing, and adaptive average pooling over windows that overlap, with their gradients.

Both are linear in each axis: Y = R X C^T with a constant matrix for the rows and one for the
columns, and the gradient is dX = R^T dY C. PyTorch's operator, applied to the unit vectors, gives
the matrices. Repeating each value a whole number of times needs no product.
"""

# ruff: noqa: ARG001 -- a rule takes the arguments of its ATen operator, in order

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Spec
from tools.export.graphs.value import Value
from tools.export.rules.layout import enlarge
from tools.export.rules.registry import rule

aten: Any = torch.ops.aten
Ints = Sequence[int]


def averages(size: Ints, parts: Ints) -> list[Tensor]:
    """The matrix (new, old) of adaptive average pooling for each axis."""
    return [
        F.adaptive_avg_pool1d(torch.eye(old, dtype=torch.float64)[None], new)[0].T
        for old, new in zip(size, parts, strict=True)
    ]


def resized(x: Value, matrices: Sequence[Tensor]) -> Value:
    """Tensor (..., *old) with a matrix (new, old) applied to each of its last axes."""
    *free, last = range(len(x.shape))
    for number, matrix in enumerate(reversed(matrices)):
        axis = last - number
        if matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(*matrix.shape)):
            continue
        shape = [matrix.shape[0] if i == axis else n for i, n in enumerate(x.shape)]
        if axis == last - 1:
            x = x.graph.constant(matrix.numpy(), x.dtype).node("MatMul", x, shape=shape)
            continue
        order = [*(i for i in (*free, last) if i != axis), axis]
        turned = x.transpose(order)
        factor = x.graph.constant(matrix.T.numpy(), x.dtype)
        product = turned.node("MatMul", factor, shape=(*turned.shape[:-1], matrix.shape[0]))
        x = product.transpose([order.index(i) for i in range(len(order))])
    return x


def _upsample(operator: Any, axes: int) -> None:
    """Register a resizing operator (x, size, [align_corners], *scales) and its gradient."""
    one = getattr(aten, operator).default
    corners = "linear" in operator or "cubic" in operator

    def matrices(old: Ints, new: Ints, settings: tuple[Any, ...]) -> list[Tensor]:
        scales = [None] * axes if len(settings) <= corners else settings[int(corners) :]
        result = []
        for i in range(axes):
            if old[i] == new[i] and scales[i] in {None, 1.0}:
                result.append(torch.eye(old[i], dtype=torch.float64))
                continue
            # unit vectors as channels, along axis i; the other axes have one place
            shape = [old[i] if j == i else 1 for j in range(axes)]
            units = torch.eye(old[i], dtype=torch.float64).reshape(1, old[i], *shape)
            size = [new[i] if j == i else 1 for j in range(axes)]
            along = [scales[i] if j == i else None for j in range(axes)]
            result.append(one(units, size, *settings[: int(corners)], *along).reshape(old[i], -1).T)
        return result

    def lower(g: Graph, out: Spec, x: Value, _: Any, *settings: Any) -> Value:
        by_axis = matrices(x.shape[2:], out.shape[2:], settings)
        factors = _repeats(by_axis)
        if factors is None:
            return resized(x, by_axis)
        return _repeated(x, factors).reshape(out.shape)

    def backward(g: Graph, out: Spec, dy: Value, new: Ints, old: Ints, *settings: Any) -> Value:
        by_axis = matrices(old[2:], new, settings)
        factors = _repeats(by_axis)
        if factors is None:
            return resized(dy, [matrix.T for matrix in by_axis])
        apart = itertools.chain(*zip(out.shape[2:], factors, strict=True))
        split = dy.reshape((*out.shape[:2], *apart))
        return split.sum([3 + 2 * i for i in range(axes)])

    rule(one)(lower)
    rule(getattr(aten, f"{operator}_backward").default)(backward)


def _repeated(x: Value, factors: Ints) -> Value:
    """Tensor (N, C, *old) with its values repeated, in some shape."""
    sides = [1] * (3 - len(factors)) + list(x.shape[2:])
    depth, rows, columns = [1] * (3 - len(factors)) + list(factors)
    planes = math.prod(x.shape[:2])
    flat = enlarge(x.reshape((planes * sides[0], 1, *sides[1:])), (rows, columns))
    if depth == 1:
        return flat
    area = sides[1] * rows * sides[2] * columns
    return enlarge(flat.reshape((planes, 1, sides[0], area)), (depth, 1))


def _repeats(matrices: Sequence[Tensor]) -> list[int] | None:
    """How often each axis repeats its values; None if the matrices do anything else."""
    factors = [matrix.shape[0] // matrix.shape[1] for matrix in matrices]
    for matrix, factor in zip(matrices, factors, strict=True):
        plain = torch.eye(matrix.shape[1], dtype=matrix.dtype).repeat_interleave(factor, 0)
        if not torch.equal(plain, matrix):
            return None
    return factors


for _axes in (1, 2, 3):
    _upsample(f"upsample_nearest{_axes}d", _axes)
    _upsample(f"_upsample_nearest_exact{_axes}d", _axes)
for _name, _axes in {
    "upsample_linear1d": 1,
    "upsample_bilinear2d": 2,
    "upsample_bicubic2d": 2,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_bicubic2d_aa": 2,
    "upsample_trilinear3d": 3,
}.items():
    _upsample(_name, _axes)
