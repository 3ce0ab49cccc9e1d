"""What a mean over many draws may miss by when there is no bias."""

import math

import numpy as np

from wire import codecs
from wire.codecs.draws import Draws

ONCE_IN = 1e6  # a test of unbiased numbers fails for one seed of a million


def assert_unbiased(draws, values):
    """The mean of `draws` (R, n) is `values` (n,), as far as R draws can tell.

    For each value by a z-test at a level of 1e-6 / n; and for all together, since a bias that is
    small everywhere shows in the sum of z^2, of mean n and, for uncorrelated values, variance 2 n.
    """
    count, n = draws.shape
    mean, spread = draws.mean(axis=0), draws.std(axis=0)
    # A value next to a level moves less than once in all draws: no error below one such move.
    spread = np.maximum(spread, np.ptp(draws) / math.sqrt(count))
    z = (mean - values) / (spread / math.sqrt(count))
    assert np.abs(z).max() < quantile(1 / (2 * n * ONCE_IN)), np.abs(z).argmax()
    assert np.square(z).mean() < 1 + quantile(1 / ONCE_IN) * math.sqrt(2 / n)


def quantile(tail):
    """The z that a standard normal number exceeds with probability `tail`."""
    low, high = 0.0, 40.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) / 2 > tail else (low, middle)
    return low


def draws_of_rows(spec, values, count):
    """A tail many times over, as rows of one part, which have their own random numbers each.

    In twenty parts of a seed each, for there are numbers that a part draws once. (count, n).
    """
    coder, n = codecs.parse(spec).coder, len(values)
    blocks = np.tile(values, (count // 20, 1))
    decoded = []
    for seed in range(20):
        rows = np.empty((len(blocks), coder.row_bytes(n)), np.uint8)
        coder.encode(blocks, Draws(seed, 1), rows)
        decoded.append(coder.decode(rows, n, Draws(seed, 1)))
    return np.concatenate(decoded).astype(np.float64)


def draws_of_blocks(spec, block, count):
    """A whole block many times over in one tensor: each has its own random numbers. (count, n)."""
    codec = codecs.parse(spec)
    values = np.tile(block, count)
    body = codec.encode(values, seed=11, name="x")
    decoded = codec.decode(body, len(values), seed=11, name="x")
    return decoded.reshape(count, -1).astype(np.float64)


def error(spec, values, seed=0):
    """Squared error over squared norm (vNMSE), and bits a value."""
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=seed, name="x")
    decoded = codec.decode(body, len(values), seed=seed, name="x").astype(np.float64)
    return np.square(decoded - values).sum() / np.square(values.astype(np.float64)).sum(), (
        8 * len(body) / len(values)
    )
