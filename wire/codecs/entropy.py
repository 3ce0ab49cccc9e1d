"""The `zstd` stage: a Zstandard frame around another codec's body, never unpacked past its size.

Level 3. On the bytes of `relu|q=4` and `relu|q=2` of trained ResNet-8 maps, level 1, 3, 6, 9 took
2.11, 2.09, 2.04, 2.02 and .91, .94, .89, .88 bits a value (CIFAR-10), 1.86, 1.67, 1.58, 1.57 and
.73, .72, .66, .63 (digits), and packed 390 to 785, 396 to 460, 108 to 155, 66 to 119 million values
a second at q=4: 6 gains some 4 % and costs three times as much as 3.
"""

from wire.errors import CodecError

LEVEL = 3


def most_bytes(n: int) -> int:
    """What a frame of `n` bytes takes at most: Zstandard's ZSTD_COMPRESSBOUND, or a little more."""
    return n + (n >> 8) + 64


def compress(raw: bytes) -> bytes:
    """One frame, which states its content's size; nothing for nothing."""
    import zstandard

    return zstandard.ZstdCompressor(level=LEVEL).compress(raw) if raw else b""


def decompress(body: memoryview | bytes, size: int, *, name: str) -> bytes:
    """The content of a frame, which must have `size` bytes and say so.

    The decoder gets a buffer of exactly `size` bytes and keeps no window beside it.

    Raises:
        CodecError: another size, a damaged or cut frame, or bytes after it.
    """
    import zstandard

    if not size:
        if len(body):
            raise CodecError(f"tensor {name!r} has no values, got {len(body)} bytes")
        return b""
    try:
        declared = zstandard.frame_content_size(body)
        if declared != size:
            got = f"{declared}" if declared >= 0 else "a frame that states no size"
            raise CodecError(f"tensor {name!r}: expected {size} bytes in the frame, got {got}")
        return zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
    except zstandard.ZstdError as fault:
        raise CodecError(f"tensor {name!r}: the Zstandard frame is damaged: {fault}") from fault
