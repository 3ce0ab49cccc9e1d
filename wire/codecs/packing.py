"""Packs levels of 1 to 8 bits into bytes and back, many rows at a time.

Eight levels become `bits` bytes, with the first level in the lowest bits and the bytes in
little-endian order. A row whose length is not a multiple of eight is padded with levels 0. At 1, 2,
4 and 8 bits a byte holds whole levels; that makes bytes good symbols for an entropy coder.

The eight bytes of eight levels are one 64-bit word. Packing closes the gaps in it in three passes,
from bytes to pairs to quadruples to the whole, for all words at once:

    .....abc .....def   ->   ..........abcdef   (3 bits, the first pass, one pair)
"""

import numpy as np

from wire.codecs.draws import Bytes, Floats


def packed_bytes(n: int, bits: int) -> int:
    """Bytes of a packed row of `n` levels."""
    return -(-n // 8) * bits


def pack(levels: Bytes, bits: int) -> Bytes:
    """Pack levels below 2^bits: (rows, n) -> (rows, packed_bytes(n, bits))."""
    rows, n = levels.shape
    if n % 8:
        padded = np.zeros((rows, -(-n // 8) * 8), np.uint8)
        padded[:, :n] = levels
        levels = padded
    if bits == 8:
        return levels
    if bits == 1:
        return np.packbits(levels, axis=1, bitorder="little")
    words = np.ascontiguousarray(levels).view("<u8")
    for lane in (8, 16, 32):
        used = bits * lane // 8
        low = _every_other(lane, used)
        words = (words & low) | ((words >> np.uint64(lane - used)) & (low << np.uint64(used)))
    octets = words.view(np.uint8).reshape(rows, -1, 8)
    packed = np.empty((rows, octets.shape[1], bits), np.uint8)
    for i in range(bits):  # `bits` long strides are faster than many short rows
        packed[..., i] = octets[..., i]
    return packed.reshape(rows, -1)


def unpack(packed: Bytes, bits: int, n: int) -> Bytes:
    """The `n` levels in each row that `pack` packed."""
    rows = len(packed)
    if bits == 8:
        return packed[:, :n]
    if bits == 1:
        return np.unpackbits(packed, axis=1, count=n, bitorder="little")
    groups = packed.reshape(rows, -1, bits)
    octets = np.zeros((*groups.shape[:2], 8), np.uint8)
    for i in range(bits):
        octets[..., i] = groups[..., i]
    words = octets.view("<u8")[..., 0]
    for lane in (32, 16, 8):
        used = bits * lane // 8
        low = _every_other(lane, used)
        words = (words & low) | ((words & (low << np.uint64(used))) << np.uint64(lane - used))
    return words.view(np.uint8).reshape(rows, -1)[:, :n]


def leading_floats(rows: Bytes, count: int) -> Floats:
    """The float32 (rows, count), little-endian, with which the bytes of each row begin."""
    return np.ascontiguousarray(rows[:, : 4 * count]).view("<f4").astype(np.float32)


def look_up(packed: Bytes, bits: int, n: int, values: Floats) -> Floats:
    """`values[unpack(packed, bits, n)]`, by a table of whole bytes if these hold whole levels.

    Args:
        packed: (rows, packed_bytes(n, bits)).
        bits: size of a level.
        n: how many levels a row has.
        values: the values of the 2^bits levels.
    """
    if bits not in (1, 2, 4):
        return values.take(unpack(packed, bits, n))
    octets = np.arange(256)[:, None]
    of_byte = values.take((octets >> np.arange(0, 8, bits)) % 2**bits)
    row_values: Floats = of_byte.take(packed.reshape(-1), axis=0).reshape(len(packed), -1)
    return row_values[:, :n]


def _every_other(lane: int, used: int) -> np.uint64:
    """The lowest `used` bits of the first, third, ... lane of a 64-bit word."""
    return np.uint64(sum(((1 << used) - 1) << at for at in range(0, 64, 2 * lane)))
