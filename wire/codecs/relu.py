"""Feature maps behind a ReLU: no rotation, an exact zero, a fitted clip level.

Half of the values in such a map are zeros, which a rotation would destroy. So the values, 0 or
more, stay where they are, and level 0 is exactly zero. A block is 1,024 values with its own scale;
in FedGKT's maps that is one channel of 32 x 32 pixels.

There are L = 2^q - 1 levels above zero (two for q = 1.5, which takes 2 bits a value before
Zstandard and at most log2(3) after it). A block x is clipped at a fraction f of its maximum and
rounded to the nearest level, l = min(round(x L / (f max x)), L). It decodes to a l. For these
levels the squared error is least if a l is the projection of x on l:

    a = <x, l> / <l, l>,   |x - a l|^2 = |x|^2 - <x, l>^2 / <l, l>

Each block takes the best of the fractions 1, 0.9, 0.75 and 0.6: clipping a few high values costs
less than coarse steps for all. The table shows the squared error divided by |x|^2 for 64 maps of
trained ResNet-8 extractors, on CIFAR-10 (on digits in brackets), without and with clipping and
projection, and the ratio of the two:

    q   without            with               ratio
    1   .439   (.284)      .175   (.103)      2.5   (2.8)
    2   .0606  (.0271)     .0333  (.0186)     1.8   (1.5)
    3   .0110  (.0055)     .00845 (.00454)    1.30  (1.21)
    4   .00237 (.00122)    .00214 (.00108)    1.10  (1.13)
    8   8.3e-6 (4.0e-6)    8.3e-6 (3.9e-6)    1.00  (1.03)

The body of a block is `a` as float32 little-endian, then the packed levels. Values are rounded to
the nearest level, without random numbers: maps are examples to learn from, and are not averaged.
"""

import re
from dataclasses import dataclass

import numpy as np

from wire.codecs.codec import LARGEST, Family, bits
from wire.codecs.draws import Bytes, Draws, Floats
from wire.codecs.packing import leading_floats, pack, packed_bytes, unpack

_HEAD = 4  # bytes of the scale
_FRACTIONS = (1.0, 0.9, 0.75, 0.6)
TERNARY = 2  # the highest of three levels


@dataclass(frozen=True)
class Relu:
    """Evenly spaced levels from zero up.

    Attributes:
        top: the highest level.
        bits: bits a value, 1 to 8; `top` fits into them.
    """

    top: int
    bits: int

    block = 1024
    lowest, highest = 0.0, LARGEST

    @property
    def spec(self) -> str:
        """The text from which `parse` makes this codec."""
        return f"relu|q={1.5 if self.top == TERNARY else self.bits}"

    def row_bytes(self, n: int) -> int:
        """Bytes of a block of `n` values."""
        return _HEAD + packed_bytes(n, self.bits)

    def encode(self, blocks: Floats, draws: Draws, out: Bytes) -> None:  # noqa: ARG002
        """(rows, n) -> (rows, row_bytes(n))."""
        peak = blocks.max(axis=1)
        unit = np.where(peak > 0, peak, 1).astype(np.float32)  # all zeros: level 0 everywhere
        scaled = blocks / unit[:, None]
        tried = []
        for fraction in _FRACTIONS:
            chosen = self._levels(scaled, np.float32(fraction))
            overlap = np.einsum("ij,ij->i", scaled, chosen)
            energy = np.einsum("ij,ij->i", chosen, chosen)
            slope = overlap / np.maximum(energy, 1)
            tried.append((overlap * slope, slope))
        gains, slopes = np.array(tried).transpose(1, 0, 2)
        best = gains.argmax(axis=0)
        fractions = np.array(_FRACTIONS, np.float32)[best]
        scale = slopes[best, np.arange(len(best))] * unit
        out[:, :_HEAD] = scale.astype("<f4")[:, None].view(np.uint8)
        levels = self._levels(scaled, fractions[:, None])
        out[:, _HEAD:] = pack(levels.astype(np.uint8), self.bits)

    def decode(self, rows: Bytes, n: int, draws: Draws) -> Floats:  # noqa: ARG002
        """(rows, row_bytes(n)) -> (rows, n)."""
        levels, _, step = self.levels(rows, n)
        values = levels.astype(np.float32)
        values *= step[:, None]
        return values

    def levels(self, rows: Bytes, n: int) -> tuple[Bytes, Floats, Floats]:
        """(rows, row_bytes(n)) -> levels (rows, n), low (rows,), step (rows,)."""
        step = leading_floats(rows, 1)[:, 0]
        return unpack(rows[:, _HEAD:], self.bits, n), np.zeros_like(step), step

    def _levels(self, scaled: Floats, fraction: Floats | np.float32) -> Floats:
        top = np.float32(self.top)
        chosen: Floats = scaled * (top / fraction)
        np.rint(chosen, out=chosen)
        np.minimum(chosen, top, out=chosen)
        return chosen


def _make(match: re.Match[str]) -> Relu:
    if match["q"] == "1.5":
        return Relu(TERNARY, 2)
    return Relu(2 ** bits(match) - 1, bits(match))


FAMILY = Family(
    r"relu\|q=(?P<q>1\.5|\d{1,3})",
    _make,
    (*(f"relu|q={q}" for q in (8, 4, 2)), "relu|q=4|zstd", "relu|q=1.5|zstd"),
)
