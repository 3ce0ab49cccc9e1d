"""The frame: the bytes of every message and of every payload record.

    offset  size  field
    0       4     magic, b"STLH"
    4       1     format version, 1
    5       1     kind (`Kind`)
    6       4     header length h, little-endian, at most 1 MiB
    10      8     body length b, little-endian
    18      h     header: a msgpack map with text keys
    18+h    b     body
    18+h+b  32    SHA-256 of all bytes before it

Nothing follows the digest. Declared sizes are checked against the actual bytes and the caller's
limit before memory is allocated for them. A file of frames holds them one after another.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, BinaryIO

import msgpack

from wire.errors import FrameError

MAGIC = b"STLH"
VERSION = 1
PREFIX = struct.Struct("<4sBBIQ")
DIGEST_BYTES = 32
MAX_HEADER_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 1 << 20


class Kind(IntEnum):
    """What a frame holds; the numbers are part of the format."""

    BIRTH = 1
    DEATH = 2
    ORDER = 3
    RESULT = 4
    RECEIPT = 5
    WANT = 6
    CHUNK = 7
    GONE = 8
    TENSORS = 9
    TELEMETRY = 10
    HELLO = 11
    UPDATE = 12
    MEASURED = 13
    SIGN = 14
    CERTIFICATE = 15
    RENEW = 16
    SEALED = 17


@dataclass(frozen=True)
class Frame:
    """The content of one frame; `body` is a view of the frame's bytes."""

    kind: Kind
    header: dict[str, Any]
    body: memoryview


def encode(kind: Kind, header: Mapping[str, Any], *body: bytes | memoryview) -> bytes:
    """The bytes of one frame; the parts of its body are joined.

    Raises:
        FrameError: the header is over `MAX_HEADER_BYTES`.
    """
    packed = msgpack.packb(dict(header), use_bin_type=True)
    if len(packed) > MAX_HEADER_BYTES:
        raise FrameError(
            f"{kind.name} frame: header of {len(packed)} bytes, limit {MAX_HEADER_BYTES}; "
            "move bulk data to the body"
        )
    prefix = PREFIX.pack(MAGIC, VERSION, kind, len(packed), sum(map(len, body)))
    digest = hashlib.sha256(prefix)
    for part in (packed, *body):
        digest.update(part)
    return b"".join((prefix, packed, *body, digest.digest()))  # the only copy of a large body


def decode(data: bytes, *, max_bytes: int = MAX_MESSAGE_BYTES) -> Frame:
    """The frame in these bytes.

    Raises:
        FrameError: the bytes are not exactly one intact frame of at most `max_bytes`.
    """
    if len(data) > max_bytes:
        raise FrameError(f"frame of {len(data)} bytes, limit {max_bytes}")
    kind, header_bytes, body_bytes = _prefix(data[: PREFIX.size])
    expected = PREFIX.size + header_bytes + body_bytes + DIGEST_BYTES
    if expected != len(data):
        raise FrameError(f"{kind.name} frame declares {expected} bytes, got {len(data)}")
    return _open(kind, header_bytes, memoryview(data))


def kind_of(data: bytes) -> Kind | None:
    """The kind that a frame's prefix says, at next to no cost; None if it is no frame of ours.

    The rest of the frame may still be damaged.
    """
    try:
        return _prefix(data[: PREFIX.size])[0]
    except FrameError:
        return None


def read(file: BinaryIO, *, max_bytes: int) -> Iterator[Frame]:
    """The frames of a file; only one is in memory at a time.

    Raises:
        FrameError: a frame is damaged, cut off, or larger than `max_bytes`.
    """
    while prefix := file.read(PREFIX.size):
        kind, header_bytes, body_bytes = _prefix(prefix)
        rest = header_bytes + body_bytes + DIGEST_BYTES
        if rest > max_bytes:
            raise FrameError(f"{kind.name} record declares {rest} bytes, limit {max_bytes}")
        data = prefix + file.read(rest)
        if len(data) != PREFIX.size + rest:
            raise FrameError(
                f"{kind.name} record declares {PREFIX.size + rest} bytes, the file ends after "
                f"{len(data)}; send it again"
            )
        yield _open(kind, header_bytes, memoryview(data))


def _prefix(prefix: bytes) -> tuple[Kind, int, int]:
    if len(prefix) != PREFIX.size:
        raise FrameError(f"frame of {len(prefix)} bytes, the prefix alone has {PREFIX.size}")
    magic, version, kind, header_bytes, body_bytes = PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise FrameError(f"expected magic {MAGIC!r}, got {magic!r}; this is not a Stillhouse frame")
    if version != VERSION:
        raise FrameError(f"expected format version {VERSION}, got {version}; update the older side")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"header declares {header_bytes} bytes, limit {MAX_HEADER_BYTES}")
    try:
        return Kind(kind), header_bytes, body_bytes
    except ValueError as fault:
        raise FrameError(f"unknown frame kind {kind}; update the older side") from fault


def _open(kind: Kind, header_bytes: int, view: memoryview) -> Frame:
    content, digest = view[:-DIGEST_BYTES], view[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest:
        raise FrameError(f"{kind.name} frame: its SHA-256 does not match its bytes; send it again")
    body_at = PREFIX.size + header_bytes
    try:
        header = msgpack.unpackb(content[PREFIX.size : body_at], raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as fault:
        raise FrameError(f"{kind.name} frame: header is not msgpack: {fault}") from fault
    if not isinstance(header, dict):
        raise FrameError(f"{kind.name} frame: header is {type(header).__name__}, expected a map")
    return Frame(kind, header, content[body_at:])
