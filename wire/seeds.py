"""Randomness that both sides can repeat: the Philox counter generator's raw 64-bit output.

numpy promises that the raw stream of a bit generator is the same in every version. It does not
promise that for the methods of `Generator`. So everything random that two machines must agree on is
made from these integers.
"""

import numpy as np
from numpy.typing import NDArray

MASK64 = (1 << 64) - 1


def source(seed: int, stream: int) -> np.random.Philox:
    """A stream, to be drawn from piece by piece; (seed, stream) is its key."""
    key = np.array([seed & MASK64, stream & MASK64], dtype=np.uint64)
    return np.random.Philox(key=key)


def raw(seed: int, stream: int, n: int) -> NDArray[np.uint64]:
    """The first `n` uniform 64-bit integers of a stream."""
    return source(seed, stream).random_raw(n)
