"""Basis transforms of blocks: values that are easier to quantize, and the way back.

    identity  the values themselves; zeros stay zeros
    hadamard  y = H D x, D a diagonal of random signs: every coefficient becomes a random sum of all
              values, near to normal whatever they were, and the range min to max, which sets the
              error of uniform quantization, falls to about 7.6 |x| / sqrt(n)
    kashin    y with x = U^T y, U an orthonormal frame of n vectors in D >= n / 0.85 dimensions: of
              the many such y one whose largest coefficient is smaller still

The matrix H is Sylvester's, orthonormal and symmetric: H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]] /
sqrt(2). A block has 4,096 coefficients, a tail as many as its transform needs.

**Kashin's representation** (Lyubarskii and Vershynin 2010, arXiv math/0611343, algorithm 1). U = H
D Z, Z scattering the n inputs to n of the D places. Starting with y = U x, coefficients are clipped
to +-M, what clipping took away, as seen through the frame, is represented again with the level
eta * M, and so on:

    r_0 = U x,   k_t = clip(r_t, eta^t M),   r_t+1 = r_t - U U^T k_t,   M = |x| / sqrt(delta D)
    y = k_0 + k_1 + ... + k_T-2 + r_T-1

The last term is not clipped, so that U^T y = x exactly. U U^T is H Z Z^T H: no signs, and Z Z^T is
a mask. T = 3, eta = 0.9 and delta = 1 are those of TensorFlow's encoding. The places of Z are drawn
at random: were they the first n = D/2, as by padding the end, then H Z would be H_n twice over, one
copy below the other, and y no flatter than the plain transform's.

Measured peaks sqrt(D) max|y| / |x| (normal x, 64 blocks): hadamard 3.8; kashin 3.35 with n = 3,481
of 4,096, and 2.6 with n = 2,048 (3.6 by padding the end).
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from wire.codecs.draws import Draws, Floats

BLOCK = 4096
RATIO = 0.85
ITERATIONS = 3
ETA = 0.9
DELTA = 1.0
_SMALLEST = 8  # coefficients; eight levels make whole bytes


class Transform(Protocol):
    """n values a row to `width(n)` coefficients a row, linear on the way back."""

    @property
    def block(self) -> int:
        """Values of a whole block, which have `BLOCK` coefficients."""

    def width(self, n: int) -> int:
        """How many coefficients `n` values have, a multiple of 8; `n` is at most `block`."""

    def forward(self, blocks: Floats, draws: Draws) -> Floats:
        """(rows, n) -> (rows, width(n)), which may be `blocks` itself."""

    def inverse(self, coefficients: Floats, n: int, draws: Draws) -> Floats:
        """(rows, width(n)) -> (rows, n)."""


@dataclass(frozen=True)
class Identity:
    """The values themselves. A tail repeats its last one, so that a constant stays one."""

    block: int = BLOCK

    def width(self, n: int) -> int:
        """The next multiple of 8."""
        return -(-n // 8) * 8

    def forward(self, blocks: Floats, draws: Draws) -> Floats:  # noqa: ARG002
        """Pad."""
        n = blocks.shape[1]
        return np.pad(blocks, ((0, 0), (0, self.width(n) - n)), "edge") if n % 8 else blocks

    def inverse(self, coefficients: Floats, n: int, draws: Draws) -> Floats:  # noqa: ARG002
        """Leave the padding out."""
        return coefficients[:, :n]


@dataclass(frozen=True)
class Hadamard:
    """The randomized Hadamard transform H D; a tail is padded with zeros."""

    block: int = BLOCK

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


@dataclass(frozen=True)
class Kashin:
    """Kashin's representation in the frame H D Z; five rotations there, one back."""

    block: int = int(RATIO * BLOCK)

    def width(self, n: int) -> int:
        """The smallest power of two with n / width <= 0.85."""
        return max(_SMALLEST, 1 << (math.ceil(n / RATIO) - 1).bit_length())

    def forward(self, blocks: Floats, draws: Draws) -> Floats:
        """Flat coefficients y with Z^T D H y = x."""
        rows, n = blocks.shape
        width = self.width(n)
        places = draws.subset(n, width)
        # Gathering, with a zero for the places that stay free, is faster than scattering.
        origin = np.full(width, n)
        origin[places] = np.arange(n)
        spread = np.zeros((rows, n + 1), np.float32)
        spread[:, :n] = blocks
        spread = spread.take(origin, axis=1)
        spread *= draws.signs(rows, width)
        rest = rotate(spread)
        taken = (origin < n).astype(np.float32)
        norms = np.sqrt(np.einsum("ij,ij->i", blocks, blocks))[:, None]
        level = norms / np.float32(math.sqrt(DELTA * width))
        flat = np.zeros_like(rest)
        for _ in range(ITERATIONS - 1):
            clipped = np.clip(rest, -level, level)
            flat += clipped
            seen = rotate(clipped)
            seen *= taken
            rest -= rotate(seen)
            level *= np.float32(ETA)
        flat += rest
        return flat

    def inverse(self, coefficients: Floats, n: int, draws: Draws) -> Floats:
        """Z^T D H y."""
        blocks = rotate(coefficients)
        blocks *= draws.signs(*coefficients.shape)
        return blocks.take(draws.subset(n, coefficients.shape[1]), axis=1)


def rotate(blocks: Floats) -> Floats:
    """Multiply each row by the orthonormal Sylvester-Hadamard matrix; its own inverse.

    H_{ab} = H_a (x) H_b, so a row of n = a*b values, seen as an a x b matrix X, becomes
    H_a X H_b: two small matrix products in place of log2(n) butterfly passes over memory.
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
