"""`float32` and `float16`: the values themselves."""

from dataclasses import dataclass

import numpy as np

from wire.codecs.codec import Family
from wire.codecs.draws import Bytes, Draws, Floats


@dataclass(frozen=True)
class Cast:
    """`float32` and `float16`: the values themselves, as little-endian numbers."""

    spec: str
    dtype: str
    highest: float

    block = 4096

    @property
    def lowest(self) -> float:
        """The largest, with a minus."""
        return -self.highest

    def row_bytes(self, n: int) -> int:
        """Bytes of a block of `n` values."""
        return n * np.dtype(self.dtype).itemsize

    def encode(self, blocks: Floats, draws: Draws, out: Bytes) -> None:  # noqa: ARG002
        """(rows, n) -> (rows, row_bytes(n))."""
        out[...] = np.ascontiguousarray(blocks, self.dtype).view(np.uint8)

    def decode(self, rows: Bytes, n: int, draws: Draws) -> Floats:  # noqa: ARG002
        """(rows, row_bytes(n)) -> (rows, n)."""
        return rows.view(self.dtype).astype(np.float32, copy=False)


_CASTS = {
    "float32": Cast("float32", "<f4", highest=3.4028234663852886e38),
    "float16": Cast("float16", "<f2", highest=65504.0),
}

FAMILY = Family(
    r"(?P<cast>float32|float16)",
    lambda match: _CASTS[match["cast"]],
    ("float32", "float16", "float32|zstd", "float16|zstd"),
)
