"""Tests of unbiasedness: how far the mean of many draws may be off if there is no bias."""

import math

import numpy as np

from wire import codecs
from wire.codecs.draws import Draws

ONCE_IN = 1e6  # a test of unbiased numbers fails for one seed of a million


def assert_unbiased(draws, values):
    """Check that the mean of `draws` (R, n) is `values` (n,), as far as R draws can tell.

    Each value has a z-test at a level of 1e-6 / n. A bias that is small everywhere shows in the sum
    of z^2, which has mean n and, for uncorrelated values, variance 2 n.
    """
    count, n = draws.shape
    mean, spread = draws.mean(axis=0), draws.std(axis=0)
    # A value next to a level may never move in all draws, so allow an error of one such move.
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
    """Decoded draws (count, n) of a tail that is repeated as rows; each row has its random numbers.

    There are twenty seeds, because some random numbers are drawn once for all rows.
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
    """Decoded draws (count, n) of a block repeated in one tensor; each has its random numbers."""
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
