"""A codec in one file: each value's sign, and the mean magnitude of its block.

    decode(encode(x)) = sign(x) * mean |x|        (Bernstein et al. 2018, arXiv 1802.04434)

To add it to Stillhouse, put the file into `wire/codecs/`, and `signs.FAMILY` into the table of
families there. A body is a scale (float32, little-endian) and one bit for each value.
"""

import re
from dataclasses import dataclass

import numpy as np

from wire.codecs.codec import LARGEST, Family
from wire.codecs.draws import Bytes, Draws, Floats
from wire.codecs.packing import leading_floats, pack, packed_bytes, unpack

_HEAD = 4  # bytes of the scale


@dataclass(frozen=True)
class Signs:
    """See the module's docstring."""

    spec = "signs"
    block = 4096
    lowest, highest = -LARGEST, LARGEST

    def row_bytes(self, n: int) -> int:
        """Bytes of a block of `n` values."""
        return _HEAD + packed_bytes(n, 1)

    def encode(self, blocks: Floats, draws: Draws, out: Bytes) -> None:
        """(rows, n) -> (rows, row_bytes(n))."""
        del draws
        scale = np.abs(blocks).mean(axis=1).astype("<f4")
        out[:, :_HEAD] = scale[:, None].view(np.uint8)
        out[:, _HEAD:] = pack((blocks >= 0).astype(np.uint8), 1)

    def decode(self, rows: Bytes, n: int, draws: Draws) -> Floats:
        """(rows, row_bytes(n)) -> (rows, n)."""
        del draws
        scale = leading_floats(rows, 1)
        signs = unpack(rows[:, _HEAD:], 1, n).astype(np.float32)
        return scale * (2 * signs - 1)


def _make(match: re.Match[str]) -> Signs:
    del match
    return Signs()


FAMILY = Family("signs", _make, ("signs", "signs|zstd"))
