"""Batch norm of a 1x1 convolution to many channels, without a pass over its output.

With z (K, n) the convolution's input, one column a pixel, x = W z (M, n) its output, S = z z^T / n
and m = mean of z, the statistics of x follow from those of z, which is M / K times smaller:

    C = S - m m^T,   mean of x = W m,   variance of x = diag(W C W^T)

and with r = 1 / sqrt(variance + eps), s = gamma r, the normalized output is a convolution by itself
(its bias the second term), so that x is never there:

    y = (diag(s) W) z + (beta - s W m)

Backward, batch norm's gradient (see `normalization`) is dx = a dy + b (x - mean of x) + c by
channel. With P = dy z^T (M, K) and t = the sums of dy:

    sum of dy (x - mean of x) = rowsum(W o P) - t (W m)
    dW = diag(a) P + n diag(b) W C + n c m^T
    dz = (diag(a) W)^T dy + (W^T diag(b) W) z + W^T (c - b W m)

Neither x nor dx is there in memory. The wide tensors are read twice (for P and for dz) where the
plain way takes eight passes over them. All of it holds as well for z - m in place of z, with m = 0.

Measured: `python -m benchmarks.choices`, see docs/benchmarks.md.
"""

import math
from dataclasses import dataclass

from tools.export.graphs.graph import Graph, Value
from tools.export.rules.elementwise import add, mul, sub, unary
from tools.export.rules.layout import reshape, transpose
from tools.export.rules.reduction import matmul, outer, reduce

WIDER = 2  # how many times as many outputs as inputs make the detour by C pay


@dataclass(frozen=True)
class Pointwise:
    """A note on x: what it is made of.

    Attributes:
        z, weight: the convolution's input and weight.
        mean: m, (K, 1).
        seen: z, or z - m where S - m m^T could lose digits: all that follows reads this.
        rest: the mean of `seen`, (K, 1), or None where that is 0.
        covariance: C, (K, K).
    """

    z: Value
    weight: Value
    mean: Value
    seen: Value
    rest: Value | None
    covariance: Value

    @property
    def matrix(self) -> tuple[int, int]:
        """M and K."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def count(self) -> int:
        """n, the number of pixels in the batch."""
        return math.prod(self.z.shape) // self.z.shape[1]


@dataclass(frozen=True)
class Gradient:
    """A note on dx = a dy + b (x - mean of x) + c; a, b, c (M, 1)."""

    of: Pointwise
    dy: Value
    a: Value
    b: Value
    c: Value


def seen_through(g: Graph, x: Value) -> Pointwise | None:
    """What x is made of, if it comes from a 1x1 convolution to at least twice the channels."""
    node = g.maker(x)
    if node is None or node.op != "Conv":
        return None
    z, weight = (g.value(name) for name in node.inputs[:2])
    outputs, inputs, *kernel = weight.shape
    steps = (*kernel, *node.attribute("strides"), node.attribute("group"))
    plain = all(n == 1 for n in steps) and not any(node.attribute("pads"))
    if not plain or outputs < WIDER * inputs:
        return None
    known = g.noted(x, Pointwise)
    if known is None:
        known = _moments(g, z, weight)
        g.note(x, known)
    return known


def _moments(g: Graph, z: Value, weight: Value) -> Pointwise:
    inputs, count = z.shape[1], math.prod(z.shape) // z.shape[1]
    mean = reshape(g, reduce(g, "ReduceMean", columns(g, z), [0, 2]), (inputs, 1))
    maker = g.maker(z)
    if maker is not None and maker.op == "Relu":
        # What a ReLU lets through deviates from its mean about as much as the mean itself.
        second = outer(g, columns(g, z), columns(g, z), 1 / count)
        covariance = sub(g, second, matmul(g, mean, mean, right=True))
        return Pointwise(z, weight, mean, z, mean, covariance)
    centred = sub(g, z, reshape(g, mean, [inputs] + [1] * (len(z.shape) - 2)))
    covariance = outer(g, columns(g, centred), columns(g, centred), 1 / count)
    return Pointwise(z, weight, mean, centred, None, covariance)


def columns(g: Graph, a: Value) -> Value:
    """(N, C, *places) as (N, C, number of places)."""
    return reshape(g, a, (a.shape[0], a.shape[1], math.prod(a.shape[2:])))


def statistics(g: Graph, pointwise: Pointwise) -> tuple[Value, Value]:
    """Mean and variance of x without the convolution's bias, (M,) each."""
    rows, inner = pointwise.matrix
    weight = reshape(g, pointwise.weight, (rows, inner))
    spread = matmul(g, weight, pointwise.covariance)
    variance = reduce(g, "ReduceSum", mul(g, weight, spread), [1])
    mean = reshape(g, matmul(g, weight, pointwise.mean), (rows,))
    return mean, unary(g, "Relu", variance)  # a rounding error under 0 has no square root


def normalised(g: Graph, pointwise: Pointwise, *, mean: Value, scale: Value, bias: Value) -> Value:
    """Scale * (x - mean) + bias: the convolution with other weights; scale = gamma r."""
    rows = pointwise.matrix[0]
    wide = [rows] + [1] * (len(pointwise.weight.shape) - 1)
    weight = mul(g, pointwise.weight, reshape(g, scale, wide))
    shift = bias if pointwise.rest is None else sub(g, bias, mul(g, scale, mean))
    return _convolve(g, pointwise.seen, weight, shift)


def _convolve(g: Graph, z: Value, weight: Value, bias: Value | None) -> Value:
    axes = len(z.shape) - 2
    inputs = [z, weight] if bias is None else [z, weight, bias]
    return g.node(
        "Conv", *inputs, shape=(z.shape[0], weight.shape[0], *z.shape[2:]), kernel_shape=[1] * axes,
        strides=[1] * axes, pads=[0] * 2 * axes, dilations=[1] * axes, group=1,
    )  # fmt: skip


def _product(g: Graph, pointwise: Pointwise, dy: Value) -> Value:
    """P = dy z^T, (M, K)."""
    return outer(g, columns(g, dy), columns(g, pointwise.seen))


def joint(g: Graph, pointwise: Pointwise, dy: Value, total: Value) -> Value:
    """The sums of dy (x - mean of x) by channel, (M,); total: the sums of dy."""
    rows, inner = pointwise.matrix
    weight = reshape(g, pointwise.weight, (rows, inner))
    raw = reduce(g, "ReduceSum", mul(g, weight, _product(g, pointwise, dy)), [1])
    if pointwise.rest is None:
        return raw
    mean = reshape(g, matmul(g, weight, pointwise.rest), (rows,))
    return sub(g, raw, mul(g, total, mean))


def weight_gradient(g: Graph, dx: Gradient) -> Value:
    """The gradient dW, in the shape of the weight."""
    pointwise = dx.of
    weight = reshape(g, pointwise.weight, pointwise.matrix)
    spread = mul(g, matmul(g, weight, pointwise.covariance), mul(g, dx.b, pointwise.count))
    whole = add(g, mul(g, _product(g, pointwise, dx.dy), dx.a), spread)
    if pointwise.rest is not None:
        level = matmul(g, mul(g, dx.c, pointwise.count), pointwise.rest, right=True)
        whole = add(g, whole, level)
    return reshape(g, whole, pointwise.weight.shape)


def input_gradient(g: Graph, dx: Gradient) -> Value:
    """dz: one convolution of dy, a small one of z, and their sum."""
    pointwise = dx.of
    rows, inner = pointwise.matrix
    ones = [1] * (len(pointwise.z.shape) - 2)
    weight = reshape(g, pointwise.weight, (rows, inner))
    back = transpose(g, mul(g, weight, dx.a), [1, 0])
    mixed = matmul(g, weight, mul(g, weight, dx.b), left=True)
    level = dx.c
    if pointwise.rest is not None:
        level = sub(g, level, mul(g, dx.b, matmul(g, weight, pointwise.rest)))
    bias = reshape(g, matmul(g, weight, level, left=True), (inner,))
    first = _convolve(g, pointwise.seen, reshape(g, mixed, (inner, inner, *ones)), bias)
    return add(g, _convolve(g, dx.dy, reshape(g, back, (inner, rows, *ones)), None), first)
