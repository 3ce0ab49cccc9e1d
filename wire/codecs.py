"""Lossy codecs of float tensors, named by specs: `float32`, `identity|q=8`, `hadamard|q=4`.

A spec is a basis transform and a quantizer (Caldas et al. 2018, section 2):

* `identity` leaves the values where they are; zeros of a ReLU stay exact zeros.
* `hadamard` rotates each block by H D / sqrt(n), D a diagonal of random signs: the values spread
  evenly, and their range, which sets the error of min-max quantization, shrinks.
* `q=N`, 1 <= N <= 8: 2^N levels evenly from the block's smallest to its largest value, stochastic
  rounding, so that the expectation is the value itself: E[decode(encode(x))] = x.

Blocks are of 4,096 values and the last one is padded (to a power of two for `hadamard`), so that
padding costs at most a block, whatever the length. The body of a block is `min` and `step` as
float32 little-endian, then N bits a value, packed eight values to N bytes.

Random signs and roundings come from `wire.seeds`, so that the same seed gives the same bytes
everywhere.
"""

import difflib
import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from wire import seeds
from wire.errors import CodecError

Floats = NDArray[np.float32]

BLOCK = 4096
TRANSFORMS = ("identity", "hadamard")
_SCALE = np.dtype("<f4")
_SIGNS, _ROUNDING = 1, 2
_SPEC = re.compile(r"(?P<transform>\w+)\|q=(?P<bits>\d{1,3})")


@dataclass(frozen=True)
class Codec:
    """`transform` "float32" means the values as they are, four bytes each."""

    transform: str
    bits: int = 32

    @property
    def spec(self) -> str:
        """The text that `parse` makes this codec of."""
        return self.transform if self.transform == "float32" else f"{self.transform}|q={self.bits}"

    @property
    def lossless(self) -> bool:
        """Whether decode(encode(x)) is x to the bit."""
        return self.transform == "float32"

    def size(self, n: int) -> int:
        """Bytes of `n` encoded values."""
        if self.lossless:
            return 4 * n
        full, tail = divmod(n, BLOCK)
        bodies = full * self._block_bytes(BLOCK)
        return bodies + (self._block_bytes(self._padded(tail)) if tail else 0)

    def encode(self, values: Floats, *, seed: int, name: str) -> bytes:
        """Encode a flat float32 vector.

        Raises:
            CodecError: `values` holds NaN or infinity; the message names the tensor.
        """
        if not np.isfinite(values).all():
            raise CodecError(
                f"tensor {name!r} holds NaN or infinity: training diverged; lower the learning rate"
            )
        if self.lossless:
            return np.ascontiguousarray(values, dtype="<f4").tobytes()
        full = len(values) - len(values) % BLOCK
        parts = [self._encode(values[:full].reshape(-1, BLOCK), seed, 0)] if full else []
        if tail := len(values) - full:
            # The identity repeats the last value, so that a constant stays one.
            fill = values[-1] if self.transform == "identity" else np.float32(0)
            padded = np.full((1, self._padded(tail)), fill, np.float32)
            padded[0, :tail] = values[full:]
            parts.append(self._encode(padded, seed, 1))
        return b"".join(parts)

    def decode(self, body: memoryview | bytes, n: int, *, seed: int, name: str) -> Floats:
        """The `n` values of an encoded vector.

        Raises:
            CodecError: the body's length is not that of `n` values, or it holds no finite values.
        """
        if len(body) != self.size(n):
            raise CodecError(
                f"tensor {name!r}: {n} values as {self.spec} take {self.size(n)} bytes, "
                f"got {len(body)}"
            )
        if self.lossless:
            values = np.frombuffer(body, "<f4").astype(np.float32, copy=False)
        else:
            full = n // BLOCK
            split = full * self._block_bytes(BLOCK)
            values = np.empty(n, np.float32)
            if full:
                values[: full * BLOCK] = self._decode(body[:split], BLOCK, seed, 0).reshape(-1)
            if tail := n % BLOCK:
                block = self._decode(body[split:], self._padded(tail), seed, 1)
                values[full * BLOCK :] = block[0, :tail]
        if not np.isfinite(values).all():
            raise CodecError(
                f"tensor {name!r} decodes to NaN or infinity; it is damaged or hostile"
            )
        return values

    def _padded(self, tail: int) -> int:
        unit = 1 << (tail - 1).bit_length() if self.transform == "hadamard" else tail
        return max(8, -(-unit // 8) * 8)

    def _block_bytes(self, width: int) -> int:
        return 2 * _SCALE.itemsize + width // 8 * self.bits

    def _encode(self, blocks: Floats, seed: int, part: int) -> bytes:
        if self.transform == "hadamard":
            blocks = rotate(blocks * _signs(blocks.shape, seed, part))
        low = blocks.min(axis=1, keepdims=True)
        span = blocks.max(axis=1, keepdims=True).astype(np.float64) - low
        step = (span / (2**self.bits - 1)).astype(np.float32)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled = np.where(step > 0, (blocks - low) / step, np.float32(0))
        scaled += _uniform(blocks.shape, seed, part)
        levels = np.minimum(scaled, 2**self.bits - 1).astype(np.uint8)  # truncation is floor here
        out = np.empty((len(blocks), self._block_bytes(blocks.shape[1])), np.uint8)
        out[:, :8] = np.hstack((low, step)).astype(_SCALE).view(np.uint8)
        out[:, 8:] = pack(levels, self.bits)
        return out.tobytes()

    def _decode(self, body: memoryview | bytes, width: int, seed: int, part: int) -> Floats:
        rows = np.frombuffer(body, np.uint8).reshape(-1, self._block_bytes(width))
        scale = np.ascontiguousarray(rows[:, :8]).view(_SCALE).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale; decode() refuses it
            blocks = unpack(rows[:, 8:], self.bits).astype(np.float32)
            blocks *= scale[:, 1:]
            blocks += scale[:, :1]
            if self.transform == "hadamard":
                blocks = rotate(blocks)
                blocks *= _signs(blocks.shape, seed, part)
        return blocks


@cache
def parse(spec: str) -> Codec:
    """The codec of a spec.

    Raises:
        CodecError: unknown (the message names the nearest), or bits out of range.
    """
    if spec == "float32":
        return Codec("float32")
    match = _SPEC.fullmatch(spec)
    if not match or match["transform"] not in TRANSFORMS:
        known = ("float32", *(f"{t}|q={n}" for t in TRANSFORMS for n in (8, 4, 2)))
        near = difflib.get_close_matches(spec, known, n=1, cutoff=0.0)[0]
        raise CodecError(f"unknown codec {spec!r}; did you mean {near!r}?")
    bits = int(match["bits"])
    if not 1 <= bits <= 8:
        raise CodecError(f"codec {spec!r}: q must be 1 to 8 bits, got {bits}")
    return Codec(match["transform"], bits)


def rotate(blocks: Floats) -> Floats:
    """Multiply each row by the orthonormal Sylvester-Hadamard matrix; its own inverse.

    H_{ab} = H_a (x) H_b, so a row of n = a*b values, seen as an a x b matrix X, becomes
    H_a X H_b: two small matrix products in place of log2(n) butterfly passes over memory.
    """
    rows, n = blocks.shape
    high = 1 << (n.bit_length() - 1) // 2
    low = n // high
    grid = blocks.reshape(rows * high, low) @ hadamard(low)
    turned: Floats = np.matmul(hadamard(high), grid.reshape(rows, high, low))
    return turned.reshape(rows, n)


@cache
def hadamard(n: int) -> Floats:
    """The orthonormal Sylvester-Hadamard matrix of n = 2^k rows."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    scaled: Floats = (matrix / np.float32(math.sqrt(n))).astype(np.float32)
    scaled.setflags(write=False)
    return scaled


def pack(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack rows of levels below 2^bits, eight levels to `bits` bytes, lowest bits first."""
    if bits == 8:
        return levels
    groups = levels.reshape(len(levels), -1, 8).astype("<u8")
    words = groups[..., 0].copy()
    for i in range(1, 8):
        words |= groups[..., i] << np.uint64(i * bits)
    packed = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(packed).reshape(len(levels), -1)


def unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The levels that `pack` packed."""
    if bits == 8:
        return packed
    groups = packed.reshape(len(packed), -1, bits)
    words = np.zeros((*groups.shape[:2], 8), np.uint8)
    words[..., :bits] = groups
    wide = words.view("<u8")[..., 0]
    levels = np.empty((*wide.shape, 8), np.uint8)
    for i in range(8):
        levels[..., i] = (wide >> np.uint64(i * bits)) & np.uint64(2**bits - 1)
    return levels.reshape(len(packed), -1)


def _signs(shape: tuple[int, ...], seed: int, part: int) -> Floats:
    n = math.prod(shape)
    words = seeds.raw(seed, 4 * part + _SIGNS, -(-n // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=n, bitorder="little")
    signs = bits.astype(np.float32)
    signs *= -2
    signs += 1
    return signs.reshape(shape)


def _uniform(shape: tuple[int, ...], seed: int, part: int) -> Floats:
    """Uniform on (0, 1): the 65,536 midpoints k + 1/2 over 65,536, whose mean is exactly 1/2."""
    n = math.prod(shape)
    words = seeds.raw(seed, 4 * part + _ROUNDING, -(-n // 4)).astype("<u8")
    uniform = words.view("<u2")[:n].astype(np.float32)
    uniform += np.float32(0.5)
    uniform *= np.float32(1 / 65536)
    return uniform.reshape(shape)
