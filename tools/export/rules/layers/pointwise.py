"""Batch norm of a 1x1 convolution to many channels, without a pass over its output.

Let z (K, n) be the convolution's input, one column a pixel, and x = W z (M, n) its output. With
S = z z^T / n and m = mean of z, the statistics of x follow from those of z, which is M / K times
smaller:

    C = S - m m^T,   mean of x = W m,   variance of x = diag(W C W^T)

With r = 1 / sqrt(variance + eps) and s = gamma r, the normalized output is a convolution itself,
with the second term as its bias, so that x is never computed:

    y = (diag(s) W) z + (beta - s W m)

Backward, batch norm's gradient (see `normalization`) is dx = a dy + b (x - mean of x) + c by
channel. With P = dy z^T (M, K) and t = the sums of dy:

    sum of dy (x - mean of x) = rowsum(W o P) - t (W m)
    dW = diag(a) P + n diag(b) W C + n c m^T
    dz = (diag(a) W)^T dy + (W^T diag(b) W) z + W^T (c - b W m)

Neither x nor dx is in memory. The wide tensors are read twice (for P and for dz), where the plain
way takes eight passes over them. All of it also holds for z - m in place of z, with m = 0.

Measured: `python -m benchmarks.choices`, see docs/benchmarks.md.
"""

import math
from dataclasses import dataclass

from tools.export.graphs.value import Value
from tools.export.rules.reduction import outer

WIDER = 2  # outputs per input from which on the way through C pays


@dataclass(frozen=True)
class Pointwise:
    """A note on x: the 1x1 convolution that made it, and the moments of its input.

    Attributes:
        z: input of the convolution, (N, K, *places).
        weight: its weight W, (M, K, 1, ...).
        mean: m, (K, 1).
        source: z, or z - m where S - m m^T could lose digits; all that follows reads this.
        source_mean: the mean of `source`, (K, 1), or None where it is 0.
        covariance: C, (K, K).
    """

    z: Value
    weight: Value
    mean: Value
    source: Value
    source_mean: Value | None
    covariance: Value

    @property
    def matrix(self) -> Value:
        """W as a matrix, (M, K)."""
        return self.weight.reshape(self.weight.shape[:2])

    @property
    def count(self) -> int:
        """n, the number of pixels in the batch."""
        return _pixels(self.z)


@dataclass(frozen=True)
class Gradient:
    """A note on dx = a dy + b (x - mean of x) + c; a, b, c (M, 1)."""

    x: Pointwise
    dy: Value
    a: Value
    b: Value
    c: Value


def widening(x: Value) -> Pointwise | None:
    """The 1x1 convolution that made x, if it has at least twice as many outputs as inputs."""
    maker = x.maker
    if maker is None or maker.op != "Conv":
        return None
    z, weight = x.sources[:2]
    outputs, inputs, *kernel = weight.shape
    sizes = (*kernel, *maker.attribute("strides"), maker.attribute("group"))
    plain = all(size == 1 for size in sizes) and not any(maker.attribute("pads"))
    if not plain or outputs < WIDER * inputs:
        return None
    noted = x.graph.noted(x, Pointwise)
    if noted is None:
        noted = _moments(z, weight)
        x.graph.note(x, noted)
    return noted


def _moments(z: Value, weight: Value) -> Pointwise:
    inputs, scale = z.shape[1], 1 / _pixels(z)
    mean = _columns(z).mean([0, 2]).reshape((inputs, 1))
    if z.maker is not None and z.maker.op == "Relu":
        # What a ReLU lets through deviates from its mean about as much as the mean itself.
        covariance = outer(_columns(z), _columns(z), scale) - mean @ mean.T
        return Pointwise(z, weight, mean, z, mean, covariance)
    centred = z - mean.reshape([inputs] + [1] * (len(z.shape) - 2))
    covariance = outer(_columns(centred), _columns(centred), scale)
    return Pointwise(z, weight, mean, centred, None, covariance)


def _pixels(z: Value) -> int:
    """Number of pixels in a batch (N, K, *places)."""
    return math.prod(z.shape) // z.shape[1]


def _columns(a: Value) -> Value:
    """(N, C, *places) as (N, C, number of places)."""
    return a.reshape((a.shape[0], a.shape[1], math.prod(a.shape[2:])))


def statistics(x: Pointwise) -> tuple[Value, Value]:
    """Mean and variance of x without the convolution's bias, (M,) each."""
    weight = x.matrix
    variance = (weight * (weight @ x.covariance)).sum([1])
    mean = _flat(weight @ x.mean)
    return mean, variance.node("Relu")  # a rounding error under 0 has no square root


def normalised(x: Pointwise, *, mean: Value, scale: Value, bias: Value) -> Value:
    """Scale * (x - mean) + bias: the convolution with other weights; scale = gamma r."""
    ones = [1] * (len(x.weight.shape) - 1)
    weight = x.weight * scale.reshape([x.weight.shape[0], *ones])
    return _convolve(x.source, weight, bias if x.source_mean is None else bias - scale * mean)


def _flat(column: Value) -> Value:
    """(M, 1) as (M,)."""
    return column.reshape(column.shape[:1])


def _convolve(z: Value, weight: Value, bias: Value | None) -> Value:
    axes = len(z.shape) - 2
    others = [weight] if bias is None else [weight, bias]
    return z.node(
        "Conv", *others, shape=(z.shape[0], weight.shape[0], *z.shape[2:]), kernel_shape=[1] * axes,
        strides=[1] * axes, pads=[0] * 2 * axes, dilations=[1] * axes, group=1,
    )  # fmt: skip


def _product(x: Pointwise, dy: Value) -> Value:
    """P = dy z^T, (M, K)."""
    return outer(_columns(dy), _columns(x.source))


def joint(x: Pointwise, dy: Value, total: Value) -> Value:
    """The sums of dy (x - mean of x) by channel, (M,); total: the sums of dy."""
    raw = (x.matrix * _product(x, dy)).sum([1])
    if x.source_mean is None:
        return raw
    return raw - total * _flat(x.matrix @ x.source_mean)


def weight_gradient(dx: Gradient) -> Value:
    """The gradient dW, in the shape of the weight."""
    x = dx.x
    spread = (x.matrix @ x.covariance) * (dx.b * x.count)
    whole = _product(x, dx.dy) * dx.a + spread
    if x.source_mean is not None:
        whole += (dx.c * x.count) @ x.source_mean.T
    return whole.reshape(x.weight.shape)


def input_gradient(dx: Gradient) -> Value:
    """dz: one convolution of dy, a small one of z, and their sum."""
    x, weight = dx.x, dx.x.matrix
    rows, inner = weight.shape
    ones = [1] * (len(x.z.shape) - 2)
    back = (weight * dx.a).transpose([1, 0])
    mixed = weight.T @ (weight * dx.b)
    level = dx.c
    if x.source_mean is not None:
        level -= dx.b * (weight @ x.source_mean)
    bias = _flat(weight.T @ level)
    first = _convolve(x.source, mixed.reshape((inner, inner, *ones)), bias)
    return _convolve(dx.dy, back.reshape((inner, rows, *ones)), None) + first
