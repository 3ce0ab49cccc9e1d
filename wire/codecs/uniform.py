"""Transform, subsampling, uniform quantization: the pipeline of Caldas et al. 2018, section 2.

**Subsampling** with rate s keeps k = max(1, round(s D)) of a block's D coefficients. The block is
cut into k strata of whole coefficients, floor(i D / k) <= j < floor((i + 1) D / k), and one place
is drawn in each. A coefficient y_j in a stratum of width w is kept with probability 1/w. If it is
kept it decodes to w y_j, otherwise to 0. So for every s exactly

    E[decoded_j] = (1/w) w y_j + (1 - 1/w) 0 = y_j

Scaling all coefficients by 1/s, as for k places drawn without replacement, would be right only if
all strata had the same width. Places never repeat, and take k random numbers and no sort. The
factor is applied when decoding, so that it does not widen the range to be quantized. Subsampling
adds (w - 1) y_j^2 to the error, about 1/s - 1 of the whole.

**Quantization** to q bits spaces 2^q levels evenly, `step` apart, from the smallest to the largest
kept coefficient of the block. It rounds at random: up with the probability that is the fraction,

    E[floor((y - min) / step + u)] = (y - min) / step,   u uniform on (0, 1)

so it adds no bias. The error of a coefficient is below one step, its variance at most step^2 / 4.
All stages are independent and linear in decoding, so the decoded block is unbiased. (u has 16 bits,
so means are exact to 2^-17 of a step.) Equal coefficients have step 0 and are exact.

The body of a block is `min` and `step` as float32 little-endian, then the packed levels.
"""

import re
from dataclasses import dataclass

import numpy as np

from wire.codecs.codec import LARGEST, NUMBER, Family, bits
from wire.codecs.draws import Bytes, Draws, Floats, strata_edges
from wire.codecs.packing import leading_floats, pack, packed_bytes, unpack
from wire.codecs.transforms import Hadamard, Identity, Kashin, Transform
from wire.errors import CodecError

_HEAD = 8  # bytes of `min` and `step`


@dataclass(frozen=True)
class Uniform:
    """Uniform quantization: one of the three transforms, a rate in (0, 1], and 1 to 8 bits."""

    name: str
    transform: Transform
    rate: float
    bits: int

    lowest, highest = -LARGEST, LARGEST

    @property
    def spec(self) -> str:
        """The text from which `parse` makes this codec, in its shortest form."""
        rate = f"|s={self.rate:g}" if self.rate < 1 else ""
        return f"{self.name}{rate}|q={self.bits}"

    @property
    def block(self) -> int:
        """How many values a whole block has."""
        return self.transform.block

    def row_bytes(self, n: int) -> int:
        """Bytes of a block of `n` values."""
        return _HEAD + packed_bytes(self._sent(self.transform.width(n)), self.bits)

    def encode(self, blocks: Floats, draws: Draws, out: Bytes) -> None:
        """(rows, n) -> (rows, row_bytes(n))."""
        y = self.transform.forward(blocks, draws)
        rows, width = y.shape
        if self.rate < 1:
            y = np.take_along_axis(y, draws.strata(rows, width, self._sent(width)), axis=1)
        top = np.float32(2**self.bits - 1)
        # Whether min returns -0.0 or 0.0 depends on the processor; adding 0 makes both 0.0.
        low, high = (find(axis=1, keepdims=True) + np.float32(0) for find in (y.min, y.max))
        span = high.astype(np.float64) - low
        step = (span / top).astype(np.float32)
        scaled = y - low
        scaled /= np.where(step > 0, step, np.float32(1))
        scaled += draws.uniform(*y.shape)
        np.minimum(scaled, top, out=scaled)  # rounding may have made `step` slightly too small
        out[:, :_HEAD] = np.hstack((low, step)).astype("<f4").view(np.uint8)
        out[:, _HEAD:] = pack(scaled.astype(np.uint8), self.bits)  # truncation is floor here

    def decode(self, rows: Bytes, n: int, draws: Draws) -> Floats:
        """(rows, row_bytes(n)) -> (rows, n)."""
        width = self.transform.width(n)
        count = self._sent(width)
        scale = leading_floats(rows, 2)
        values = unpack(rows[:, _HEAD:], self.bits, count).astype(np.float32)
        values *= scale[:, 1:]
        values += scale[:, :1]
        if self.rate < 1:
            values *= np.diff(strata_edges(width, count)).astype(np.float32)
            coefficients = np.zeros((len(rows), width), np.float32)
            np.put_along_axis(coefficients, draws.strata(len(rows), width, count), values, axis=1)
            values = coefficients
        return self.transform.inverse(values, n, draws)

    def levels(self, rows: Bytes, n: int) -> tuple[Bytes, Floats, Floats] | None:
        """(rows, row_bytes(n)) -> levels (rows, n), low and step (rows,); only for identity."""
        if self.rate < 1 or not isinstance(self.transform, Identity):
            return None
        scale = leading_floats(rows, 2)
        return unpack(rows[:, _HEAD:], self.bits, n), scale[:, 0], scale[:, 1]

    def _sent(self, width: int) -> int:
        """How many of `width` coefficients are sent."""
        return max(1, round(self.rate * width))


_TRANSFORMS: dict[str, Transform] = {
    "identity": Identity(),
    "hadamard": Hadamard(),
    "kashin": Kashin(),
}


def _make(match: re.Match[str]) -> Uniform:
    rate, name = float(match["s"] or 1), match["transform"]
    if not 0 < rate <= 1:
        raise CodecError(f"codec {match.string!r}: s must be over 0 to 1, got {rate:g}")
    return Uniform(name, _TRANSFORMS[name], rate, bits(match))


FAMILY = Family(
    rf"(?P<transform>identity|hadamard|kashin) (?:\|s=(?P<s>{NUMBER}))? \|q=(?P<q>\d{{1,3}})",
    _make,
    (
        *(f"{name}|q={q}" for name in _TRANSFORMS for q in (8, 4, 2)),
        *(f"{name}|s=0.25|q=4" for name in _TRANSFORMS),
        "identity|q=8|zstd",
    ),
)
