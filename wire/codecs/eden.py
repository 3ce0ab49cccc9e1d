"""EDEN: random rotation, the best levels for the normal distribution, one scale a block.

Vargaftik et al. 2022 (arXiv 2108.08842); with one bit, DRIVE (Vargaftik et al. 2021, arXiv
2105.08339). A block x of D values is rotated, y = R x. Whatever x was, the coefficients of
y sqrt(D) / |y| are then nearly N(0, 1), and each is replaced by the nearest of 2^b Lloyd-Max
levels. Let c be the vector of these levels. The block decodes to S R^T c, where S depends on the
use:

**Unbiased, S = |y|^2 / <c, y>** (for updates, which are averaged). Along x the estimate is always
exact: <S R^T c, x> = S <c, y> = |x|^2. Across x its mean is zero if R is uniformly random: let F be
the reflection that keeps x and reverses everything orthogonal to x. R F is as likely as R. It gives
the same y, so the same c and S, but the opposite part across x. The proof does not use how c is
made from y: coordinates may have different numbers of bits, or none. The error is
|x|^2 (1 / cos^2 - 1), where cos is the cosine between c and y.

**Least error, S = <c, y> / |c|^2** (`mse`, for downloads, which are not averaged). This projects y
on c. The error is |x|^2 (1 - cos^2).

**Fractions of a bit.** For z ~ N(0, 1) and its level c, E[z c] = E[c^2] = 1 - d_b. So cos^2 is
close to the mean of 1 - d_b over the coordinates; a coordinate that is not sent has d_0 = 1.

    2 <= b < 3, say     the first (b - 2) D coordinates have 3 bits, the others 2. Any fixed set
                        would do, because a rotated block's coordinates are exchangeable; this one
                        makes two slices of memory.
    b < 1               b D coordinates, one in each of as many strata (see `uniform`), have one
                        bit: cos^2 = b 2/pi. The widths of the strata do not matter: S alone makes
                        the estimate unbiased, and unequal factors would turn c away from y. The
                        seed draws the coordinates, so that no direction is always lost.

**Two rotations.** R = H D_1 H D_2 if no bias is allowed, R = H D for `mse`. The proof needs a
uniformly random R. One Hadamard transform is not random enough if few values dominate the block:
from x = (2, 1, 0, 0, ...) it makes a y whose signs depend only on x_1, and with one bit that
decodes to (2.5, 0, 0, ...) for every seed. With two, x is flat before the second one. The table
shows the deviation of the mean of 20,000 seeds from x, at one bit, as a share of |x|^2, and the
largest deviation of one value in standard errors:

    x, D = 512                         one rotation        two
    normal                             .000004    3.8      none    3.0
    log-normal, random signs           .0002      54       none    3.5
    nine normal values, else zeros     .012       96       .000004 4.4
    (2, 1, 0, 0, ...)                  .25                 .000005 6.1

At D = 4,096 two rotations leave a deviation of at most .000001 for (1, r, 0, 0, ...), for every r
tried. Short tails are less random: below 1,024 coefficients they are rotated three times, and they
are padded to at least 64.

The body of a block is S as float32 little-endian, then the packed levels.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wire.codecs.codec import LARGEST, NUMBER, Family
from wire.codecs.draws import Bytes, Draws, Floats
from wire.codecs.lloyd_max import levels, nearest
from wire.codecs.packing import leading_floats, look_up, pack, packed_bytes
from wire.codecs.transforms import BLOCK, rotate
from wire.errors import CodecError

_HEAD = 4  # bytes of the scale
_SMALLEST = 64  # coefficients; see above
_THRICE = 1024  # coefficients; shorter blocks are rotated three times
_SEEN = 1e-5  # a smaller factor is only rounding error


@dataclass(frozen=True)
class Eden:
    """EDEN with `bits` a value, 0.05 to 8, also fractions; `mse`: least error, but biased."""

    bits: float
    mse: bool

    block = BLOCK
    lowest, highest = -LARGEST, LARGEST

    @property
    def spec(self) -> str:
        """The text from which `parse` makes this codec."""
        return f"eden|b={self.bits:g}" + ("|mse" if self.mse else "")

    def row_bytes(self, n: int) -> int:
        """Bytes of a block of `n` values."""
        slices = self._slices(_width(n))
        return _HEAD + sum(packed_bytes(end - start, bits) for start, end, bits in slices)

    def encode(self, blocks: Floats, draws: Draws, out: Bytes) -> None:
        """(rows, n) -> (rows, row_bytes(n))."""
        rows, width = len(blocks), _width(blocks.shape[1])
        # Scale by powers of two, so that no square over- or underflows.
        exponents = np.frexp(np.abs(blocks).max(axis=1, keepdims=True))[1]
        unit = np.exp2(-np.maximum(exponents, -126)).astype(np.float32)
        y = np.zeros((rows, width), np.float32)
        np.multiply(blocks, unit, out=y[:, : blocks.shape[1]])
        for signs in self._signs(rows, width, draws):
            y *= signs
            y = rotate(y)
        length = np.sqrt(_dots(y, y) / width)
        y /= np.where(length > 0, length, 1)[:, None].astype(np.float32)
        if self.bits < 1:
            y = np.take_along_axis(y, draws.strata(rows, width, self._sent(width)), axis=1)
        overlap, energy, at = np.zeros(rows), np.zeros(rows), _HEAD
        for start, end, bits in self._slices(width):
            part = y[:, start:end]
            chosen = nearest(part, bits)
            c = levels(bits).take(chosen)
            overlap += _dots(c, part)
            energy += _dots(c, c)
            packed = pack(chosen, bits)
            out[:, at : at + packed.shape[1]] = packed
            at += packed.shape[1]
        factor = overlap / energy
        if not self.mse:  # 0 for a block that is zero, or zero in all coordinates that are sent
            factor = np.divide(width, overlap, out=np.zeros(rows), where=factor > _SEEN)
        scale = (factor * length / unit[:, 0]).astype("<f4")
        out[:, :_HEAD] = scale[:, None].view(np.uint8)

    def decode(self, rows: Bytes, n: int, draws: Draws) -> Floats:
        """(rows, row_bytes(n)) -> (rows, n)."""
        width = _width(n)
        scale = leading_floats(rows, 1)
        parts, at = [], _HEAD
        for start, end, bits in self._slices(width):
            packed = rows[:, at : at + packed_bytes(end - start, bits)]
            parts.append(look_up(packed, bits, end - start, levels(bits)))
            at += packed.shape[1]
        y = np.hstack(parts) if len(parts) > 1 else parts[0]
        if self.bits < 1:
            c, y = y, np.zeros((len(rows), width), np.float32)
            places = draws.strata(len(rows), width, self._sent(width))
            np.put_along_axis(y, places, c, axis=1)
        y *= scale
        for signs in reversed(self._signs(len(rows), width, draws)):
            y = rotate(y)
            y *= signs
        return y[:, :n]

    def _signs(self, rows: int, width: int, draws: Draws) -> list[Floats]:
        count = 3 if width < _THRICE else 1 if self.mse else 2
        drawn = draws.signs(rows, count * width).reshape(rows, count, width)
        return [drawn[:, i] for i in range(count)]

    def _sent(self, width: int) -> int:
        """How many of `width` coordinates are sent."""
        return max(1, round(min(self.bits, 1) * width))

    def _slices(self, width: int) -> Iterator[tuple[int, int, int]]:
        """Ranges of coordinates (start, end) with the bits of each; ranges fill whole bytes."""
        if self.bits < 1:
            yield 0, self._sent(width), 1
            return
        low = int(self.bits)
        finer = round((self.bits - low) * width / 8) * 8
        if finer:
            yield 0, finer, low + 1
        if finer < width:
            yield finer, width, low


def _dots(a: Floats, b: Floats) -> NDArray[np.float64]:
    """Inner products of rows: (rows,)."""
    products: Floats = np.einsum("ij,ij->i", a, b)
    return products.astype(np.float64)


def _width(n: int) -> int:
    """How many coefficients `n` values have: a power of two."""
    return max(_SMALLEST, 1 << (n - 1).bit_length())


def _make(match: re.Match[str]) -> Eden:
    share = float(match["b"] or 1)
    if not 0.05 <= share <= 8:
        raise CodecError(f"codec {match.string!r}: b must be 0.05 to 8 bits, got {share:g}")
    return Eden(share, mse=match["mse"] is not None)


FAMILY = Family(
    rf"(?: eden\|b=(?P<b>{NUMBER}) | drive ) (?P<mse>\|mse)?",
    _make,
    ("drive", "drive|mse", *(f"eden|b={b}{mse}" for b in (2, 4) for mse in ("", "|mse"))),
)
