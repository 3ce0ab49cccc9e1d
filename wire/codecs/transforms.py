"""Basis transforms of blocks, which make values easier to quantize; and their inverses.

    identity  the values themselves; zeros stay zeros
    hadamard  y = H D x, with a diagonal D of random signs. Every coefficient becomes a random sum
              of all values, nearly normal whatever they were. The range from min to max, which
              determines the error of uniform quantization, shrinks to about 7.6 |x| / sqrt(n)
    kashin    a y with x = U^T y, where U is an orthonormal frame of n vectors in D >= n / 0.85
              dimensions: among all such y, one with an even smaller largest coefficient

The matrix H is Sylvester's, orthonormal and symmetric: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]] /
sqrt(2). A block has 4,096 coefficients, a tail as many as its transform needs.

**Kashin's representation** (Lyubarskii and Vershynin 2010, arXiv math/0611343, algorithm 1).
U = H D Z, where Z scatters the n inputs to n of the D places. It starts with y = U x and clips the
coefficients to +-M. What clipping has removed, seen through the frame, is represented again with
the level eta * M, and so on:

    r_0 = U x,   k_t = clip(r_t, eta^t M),   r_t+1 = r_t - U U^T k_t,   M = |x| / sqrt(delta D)
    y = k_0 + k_1 + ... + k_T-2 + r_T-1

The last term is not clipped, so U^T y = x exactly. U U^T is H Z Z^T H, without signs, and Z Z^T is
a mask. T = 3, eta = 0.9 and delta = 1 are the values of TensorFlow's encoding. The places of Z are
drawn at random. If they were the first n = D/2, as when padding the end, H Z would be two copies of
H_n, one below the other, and y would be no flatter than the plain transform's.

Measured peaks sqrt(D) max|y| / |x| (normal x, 64 blocks): hadamard 3.8; kashin 3.35 with n = 3,481
of 4,096, and 2.6 with n = 2,048 (3.6 when padding the end).
"""

import math
from functools import cache

import numpy as np

from wire.codecs.draws import Draws, Floats

BLOCK = 4096
RATIO = 0.85
ITERATIONS = 3
ETA = 0.9
DELTA = 1.0
_SMALLEST = 8  # coefficients; eight levels make whole bytes


class Identity:
    """The values themselves; a tail is padded with its last one, so that a constant stays one."""

    block = BLOCK

    def width(self, n: int) -> int:
        """The next multiple of 8."""
        return -(-n // 8) * 8

    def forward(self, blocks: Floats, draws: Draws) -> Floats:  # noqa: ARG002
        """The values, padded."""
        n = blocks.shape[1]
        return np.pad(blocks, ((0, 0), (0, self.width(n) - n)), "edge") if n % 8 else blocks

    def inverse(self, coefficients: Floats, n: int, draws: Draws) -> Floats:  # noqa: ARG002
        """The values without the padding."""
        return coefficients[:, :n]


class Hadamard:
    """The randomized Hadamard transform H D; a tail is padded with zeros."""

    block = BLOCK

    def width(self, n: int) -> int:
        """The next power of two."""
        return max(_SMALLEST, 1 << (n - 1).bit_length())

    def forward(self, blocks: Floats, draws: Draws) -> Floats:
        """H D x."""
        flipped = draws.signs(len(blocks), self.width(blocks.shape[1]))
        flipped[:, : blocks.shape[1]] *= blocks
        flipped[:, blocks.shape[1] :] = 0
        return rotate(flipped)

    def inverse(self, coefficients: Floats, n: int, draws: Draws) -> Floats:
        """D H y."""
        blocks = rotate(coefficients)
        blocks *= draws.signs(*coefficients.shape)
        return blocks[:, :n]


class Kashin:
    """Kashin's representation in the frame H D Z; five rotations to encode, one to decode."""

    block = int(RATIO * BLOCK)

    def width(self, n: int) -> int:
        """The smallest power of two with n / width <= 0.85."""
        return max(_SMALLEST, 1 << (math.ceil(n / RATIO) - 1).bit_length())

    def forward(self, blocks: Floats, draws: Draws) -> Floats:
        """Flat coefficients y with Z^T D H y = x."""
        rows, n = blocks.shape
        width = self.width(n)
        places = draws.subset(n, width)
        # Gathering, with a zero for the free places, is faster than scattering.
        origin = np.full(width, n)
        origin[places] = np.arange(n)
        spread = np.zeros((rows, n + 1), np.float32)
        spread[:, :n] = blocks
        spread = spread.take(origin, axis=1)
        spread *= draws.signs(rows, width)
        rest = rotate(spread)
        mask = (origin < n).astype(np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", blocks, blocks))[:, None]
        level = norms / np.float32(math.sqrt(DELTA * width))
        flat = np.zeros_like(rest)
        for _ in range(ITERATIONS - 1):
            clipped = np.clip(rest, -level, level)
            flat += clipped
            seen = rotate(clipped)
            seen *= mask
            rest -= rotate(seen)
            level *= np.float32(ETA)
        flat += rest
        return flat

    def inverse(self, coefficients: Floats, n: int, draws: Draws) -> Floats:
        """Z^T D H y."""
        blocks = rotate(coefficients)
        blocks *= draws.signs(*coefficients.shape)
        return blocks.take(draws.subset(n, coefficients.shape[1]), axis=1)


Transform = Identity | Hadamard | Kashin
"""Turns n values a row into `width(n)` coefficients a row; the inverse is linear.

`block` is the number of values in a whole block; they give `BLOCK` coefficients. A width is a
multiple of 8. `forward` may return its argument.
"""


def rotate(blocks: Floats) -> Floats:
    """Multiply each row by the orthonormal Sylvester-Hadamard matrix; its own inverse.

    H_{ab} = H_a (x) H_b, so a row of n = a*b values, seen as an a x b matrix X, becomes
    H_a X H_b: two small matrix products instead of log2(n) butterfly passes over memory.
    """
    rows, n = blocks.shape
    high = 1 << (n.bit_length() - 1) // 2
    low = n // high
    grid = blocks.reshape(rows * high, low) @ hadamard(low)
    turned: Floats = np.matmul(hadamard(high), grid.reshape(rows, high, low))
    return turned.reshape(rows, n)


@cache
def hadamard(n: int) -> Floats:
    """The orthonormal Sylvester-Hadamard matrix of n = 2^k rows."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Floats = (matrix / np.float32(math.sqrt(n))).astype(np.float32)
    scaled.setflags(write=False)
    return scaled
