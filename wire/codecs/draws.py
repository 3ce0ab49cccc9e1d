"""The random numbers of an encoded tensor, which both sides draw from its seed.

A tensor has two parts, its whole blocks (0) and its tail (1). Each part has four streams, with the
Philox key (seed, 4 * part + kind). Every row (a block) starts at a new 64-bit word of a stream. So
a block's numbers depend only on its place in the tensor, not on how many blocks are processed at a
time.
"""

import numpy as np
from numpy.typing import NDArray

from wire import seeds

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Places = NDArray[np.int64]

_SUBSET, _SIGNS, _ROUNDING, _STRATA = range(4)

# Every byte as eight signs, lowest bit first: 0 is +1 and 1 is -1. Gathering 32 bytes for eight
# values is twice as fast as unpacking bits and converting them.
_SIGNS_OF_BYTE = 1 - 2 * np.unpackbits(
    np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
).astype(np.float32)


class Draws:
    """The random numbers of one part of a tensor, in the order of its blocks."""

    def __init__(self, seed: int, part: int) -> None:
        self._seed, self._first = seed, 4 * part
        self._streams: dict[int, np.random.Philox] = {}
        self._subsets: dict[tuple[int, int], Places] = {}

    def signs(self, rows: int, n: int) -> Floats:
        """The next `rows` rows of `n` fair signs, -1 or 1; `n` is a multiple of 8."""
        octets = self._words(_SIGNS, rows, n, per_word=64).view(np.uint8)[:, : n // 8]
        return _SIGNS_OF_BYTE.take(octets.reshape(-1), axis=0).reshape(rows, n)

    def uniform(self, rows: int, n: int) -> Floats:
        """The next rows of numbers in (0, 1): the midpoints (k + 1/2) / 65,536, of mean 1/2."""
        words = self._words(_ROUNDING, rows, n, per_word=4)
        numbers = words.view("<u2")[:, :n].astype(np.float32)
        numbers += np.float32(0.5)
        numbers *= np.float32(1 / 65536)
        return numbers

    def strata(self, rows: int, width: int, count: int) -> Places:
        """The next rows of positions, one in each of `count` strata of `range(width)`.

        Stratum i is floor(i * width / count) <= j < floor((i + 1) * width / count). A position is
        the stratum's start plus floor(r * w / 2^32), with its width w and a 32-bit integer r. This
        is uniform if w is a power of two, otherwise to a relative 2^-20.
        """
        edges = strata_edges(width, count)
        words = self._words(_STRATA, rows, count, per_word=2)
        numbers = words.view("<u4")[:, :count].astype(np.int64)
        numbers *= np.diff(edges)
        numbers >>= 32
        numbers += edges[:-1]
        return numbers

    def subset(self, n: int, width: int) -> Places:
        """`n` of `range(width)` in ascending order, all choices with the same probability.

        Every call returns the same choice; it is for all blocks of the part.
        """
        if (n, width) not in self._subsets:
            numbers = seeds.raw(self._seed, self._first + _SUBSET, width)
            shuffled = numbers.argsort(kind="stable")
            self._subsets[n, width] = np.sort(shuffled[:n])
        return self._subsets[n, width]

    def _words(self, kind: int, rows: int, n: int, *, per_word: int) -> NDArray[np.uint64]:
        """The next words of a stream: (rows, ceil(n / per_word)), little-endian."""
        if kind not in self._streams:
            self._streams[kind] = seeds.source(self._seed, self._first + kind)
        words = -(-n // per_word)
        drawn = self._streams[kind].random_raw(rows * words)
        return drawn.astype("<u8", copy=False).reshape(rows, words)


def strata_edges(width: int, count: int) -> Places:
    """The starts of the `count` strata of `range(width)`, then `width`: (count + 1,)."""
    return np.arange(count + 1, dtype=np.int64) * width // count
