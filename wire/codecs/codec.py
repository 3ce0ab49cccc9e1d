"""A codec: turns values into bytes and back, one group of blocks at a time, and checks both.

Blocks are independent, so a tensor is processed in groups of 65,536 values. Their intermediate
results of 256 KiB stay in the processor's cache, and memory is needed for a group, not a tensor.
`eden|b=2` encodes 85 and decodes 122 million values a second in groups of 2^16, and as many with
2^17 and 2^18; but 50 and 87 with 2^13 (two blocks), and 50 and 57 with the whole tensor at once
(1.66 million values, one thread of an AMD EPYC with 1 MiB of L2, processor time, medians of 9).
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np

from wire.codecs import entropy
from wire.codecs.draws import Bytes, Draws, Floats
from wire.errors import CodecError

GROUP = 1 << 16  # values
_NOT_FINITE = "tensor {name!r} decodes to NaN or infinity; it is damaged or hostile"
LARGEST = 2.0**100  # magnitude that lossy codecs take: sums of a block stay within float32


class Coder(Protocol):
    """Turns blocks of values into rows of bytes, and back."""

    @property
    def spec(self) -> str:
        """The text from which `parse` makes it."""

    @property
    def block(self) -> int:
        """How many values a whole block has; a tensor's last block, its tail, may have fewer."""

    @property
    def lowest(self) -> float:
        """The smallest value that it takes."""

    @property
    def highest(self) -> float:
        """The greatest value that it takes."""

    def row_bytes(self, n: int) -> int:
        """Bytes of a block of `n` values, 1 <= n <= block."""

    def encode(self, blocks: Floats, draws: Draws, out: Bytes) -> None:
        """Encode finite values (rows, n); write the bytes (rows, row_bytes(n)) to `out`."""

    def decode(self, rows: Bytes, n: int, draws: Draws) -> Floats:
        """The values (rows, n) of any bytes (rows, row_bytes(n))."""


@runtime_checkable
class Quantizer(Protocol):
    """A coder whose values are evenly spaced levels in each block."""

    def levels(self, rows: Bytes, n: int) -> tuple[Bytes, Floats, Floats] | None:
        """The levels (rows, n), `low` (rows,) and `step` (rows,) in bytes.

        None if a transform or subsampling comes between levels and values.
        """


@dataclass(frozen=True)
class Lattice:
    """A tensor (N, ...) as it was quantized, in blocks of neighbours; each sample has k blocks.

    Value i of block j of sample s is low[s, j] + step[s, j] * levels[s, j, i].

    Attributes:
        levels: uint8, of the tensor's shape.
        low, step: float32 (N, k).
    """

    levels: Bytes
    low: Floats
    step: Floats


@dataclass(frozen=True)
class Family:
    """Coders that one file makes, by the specs that name them.

    Attributes:
        pattern: of their specs, a regular expression (verbose) with named groups.
        make: the coder of a match; raises CodecError where a number is out of range.
        examples: of specs, among which a misspelt one finds its nearest.
    """

    pattern: str
    make: Callable[[re.Match[str]], Coder]
    examples: tuple[str, ...]

    def parse(self, spec: str) -> "Codec | None":
        """The codec of a spec, with Zstandard or without; None: it is not one of these.

        Raises:
            CodecError: a number is out of range.
        """
        match = self._specs.fullmatch(spec)
        return Codec(self.make(match), match["zstd"] is not None) if match else None

    @cached_property
    def _specs(self) -> re.Pattern[str]:
        return re.compile(rf"(?: {self.pattern} ) (?P<zstd>\|zstd)?", re.VERBOSE | re.ASCII)


NUMBER = r"\d{1,3}(?:\.\d{1,4})?"  # in a pattern


def bits(match: re.Match[str]) -> int:
    """The group `q` of a spec: bits a value.

    Raises:
        CodecError: they are not 1 to 8.
    """
    if not 1 <= int(match["q"]) <= 8:
        raise CodecError(f"codec {match.string!r}: q must be 1 to 8 bits, got {int(match['q'])}")
    return int(match["q"])


@dataclass(frozen=True)
class Codec:
    """A coder of blocks, perhaps with Zstandard around its bytes."""

    coder: Coder
    compressed: bool

    @property
    def spec(self) -> str:
        """The text from which `parse` makes this codec."""
        return self.coder.spec + ("|zstd" if self.compressed else "")

    @property
    def fixed_size(self) -> bool:
        """Whether any `n` values take exactly `size(n)` bytes, not just at most."""
        return not self.compressed

    def size(self, n: int) -> int:
        """Bytes of `n` encoded values; if `fixed_size` is false, the most that they can take."""
        plain = self._plain_size(n)
        return entropy.most_bytes(plain) if self.compressed else plain

    def encode(self, values: Floats, *, seed: int, name: str) -> bytes:
        """Encode a flat float32 vector.

        Raises:
            CodecError: a value is NaN, infinite, or out of the codec's range; the message names
                the tensor.
        """
        self._admit(values, name)
        values = np.ascontiguousarray(values, np.float32)  # sums depend on the order in memory
        out = np.empty(self._plain_size(len(values)), np.uint8)
        with np.errstate(over="ignore", under="ignore"):  # norms of the largest and the smallest
            for at, into, n, draws in self._groups(len(values), seed):
                blocks = values[at].reshape(-1, n)
                self.coder.encode(blocks, draws, out[into].reshape(len(blocks), -1))
        return entropy.compress(out.tobytes()) if self.compressed else out.tobytes()

    def decode(self, body: memoryview | bytes, n: int, *, seed: int, name: str) -> Floats:
        """The `n` values of an encoded vector.

        Raises:
            CodecError: the body does not hold `n` values, or some are not finite.
        """
        rows = self._rows(body, n, name)
        values = np.empty(n, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale is refused below
            for at, come_from, width, draws in self._groups(n, seed):
                row_bytes = self.coder.row_bytes(width)
                decoded = self.coder.decode(rows[come_from].reshape(-1, row_bytes), width, draws)
                if not np.isfinite(decoded).all():
                    raise CodecError(_NOT_FINITE.format(name=name))
                values[at].reshape(decoded.shape)[...] = decoded
        return values

    def lattice(
        self, body: memoryview | bytes, shape: tuple[int, ...], *, name: str
    ) -> Lattice | None:
        """An encoded tensor (samples, ...) as levels; None if this codec or shape has none.

        Raises:
            CodecError: see `decode`.
        """
        n, block, coder = math.prod(shape), self.coder.block, self.coder
        if not n or not isinstance(coder, Quantizer) or math.prod(shape[1:]) % block:
            return None
        rows = self._rows(body, n, name).reshape(-1, coder.row_bytes(block))
        quantized = coder.levels(rows, block)
        if quantized is None:
            return None
        levels, low, step = quantized
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale
            if not np.isfinite(low + step * np.float32(255)).all():
                raise CodecError(_NOT_FINITE.format(name=name))
        return Lattice(levels.reshape(shape), low.reshape(shape[0], -1), step.reshape(shape[0], -1))

    def _rows(self, body: memoryview | bytes, n: int, name: str) -> Bytes:
        """The bytes of all blocks of `n` values."""
        size = self._plain_size(n)
        if self.compressed:
            body = entropy.decompress(body, size, name=name)
        elif len(body) != size:
            raise CodecError(
                f"tensor {name!r}: {n} values as {self.spec} take {size} bytes, got {len(body)}"
            )
        return np.frombuffer(body, np.uint8)

    def _plain_size(self, n: int) -> int:
        whole, tail = divmod(n, self.coder.block)
        size = whole * self.coder.row_bytes(self.coder.block)
        return size + (self.coder.row_bytes(tail) if tail else 0)

    def _groups(self, n: int, seed: int) -> Iterator[tuple[slice, slice, int, Draws]]:
        """For each group: which values, which bytes, values in a block, random numbers."""
        block = self.coder.block
        row_bytes = self.coder.row_bytes(block)
        whole, tail = divmod(n, block)
        draws, step = Draws(seed, 0), GROUP // block
        for row in range(0, whole, step):
            end = min(row + step, whole)
            yield (
                slice(row * block, end * block),
                slice(row * row_bytes, end * row_bytes),
                block,
                draws,
            )
        if tail:
            yield slice(whole * block, n), slice(whole * row_bytes, None), tail, Draws(seed, 1)

    def _admit(self, values: Floats, name: str) -> None:
        if not len(values):
            return
        low, high = float(values.min()), float(values.max())
        if low >= self.coder.lowest and high <= self.coder.highest:
            return  # NaN fails both comparisons
        if not np.isfinite([low, high]).all():
            raise CodecError(
                f"tensor {name!r} holds NaN or infinity: training diverged; lower the learning rate"
            )
        worst = high if high > self.coder.highest else low
        raise CodecError(
            f"tensor {name!r} holds {worst:.6g}; {self.spec} takes "
            f"{self.coder.lowest:.6g} to {self.coder.highest:.6g}; choose another codec for it"
        )
