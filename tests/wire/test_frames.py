"""The byte format is pinned, and a frame with false lengths or digests is refused."""

import hashlib
import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire import frames
from wire.errors import FrameError, WireError
from wire.frames import Kind

# Format version 1. If this changes, frames of devices in the field can no longer be read.
GOLDEN = bytes.fromhex(
    "53544c480107120000000300000000000000"  # magic, version, CHUNK, 18 header bytes, 3 body bytes
    "82a6646967657374a26162a5696e64657803"  # {"digest": "ab", "index": 3}
    "78797a"
    "12ca526388bb08e96d4655768c93bb8008d1177ef36ae05aaf2f2cf3206edc50"  # SHA-256 of all before
)


def signed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def test_golden_bytes():
    assert frames.encode(Kind.CHUNK, {"digest": "ab", "index": 3}, b"xyz") == GOLDEN
    frame = frames.decode(GOLDEN)
    assert (frame.kind, frame.header, bytes(frame.body)) == (
        Kind.CHUNK,
        {"digest": "ab", "index": 3},
        b"xyz",
    )


@pytest.mark.parametrize("cut", [0, 1, 17, 18, 40, len(GOLDEN) - 1])
def test_a_truncated_frame_is_refused(cut):
    with pytest.raises(FrameError):
        frames.decode(GOLDEN[:cut])


@pytest.mark.parametrize("at", range(len(GOLDEN)))
def test_every_flipped_byte_is_noticed(at):
    damaged = bytearray(GOLDEN)
    damaged[at] ^= 0x55
    with pytest.raises(FrameError):
        frames.decode(bytes(damaged))


@pytest.mark.parametrize(
    ("header_bytes", "body_bytes"), [(18, 2**63), (2**31, 3), (18, 4), (0, 0), (17, 4)]
)
def test_a_frame_that_lies_about_its_sizes_is_refused(header_bytes, body_bytes):
    prefix = struct.pack("<4sBBIQ", b"STLH", 1, 7, header_bytes, body_bytes)
    with pytest.raises(FrameError):
        frames.decode(signed(prefix + GOLDEN[18:39]))


def test_a_file_record_that_declares_a_terabyte_is_refused_before_reading():
    prefix = struct.pack("<4sBBIQ", b"STLH", 1, 9, 10, 2**40)
    with pytest.raises(FrameError, match="limit 1000"):
        list(frames.read(io.BytesIO(prefix + b"x" * 50), max_bytes=1000))


def test_a_file_of_frames_reads_back_and_says_where_it_is_cut_off():
    data = b"".join(frames.encode(Kind.TENSORS, {"n": n}, bytes(n)) for n in range(4))
    headers = [frame.header["n"] for frame in frames.read(io.BytesIO(data), max_bytes=1000)]
    assert headers == [0, 1, 2, 3]
    with pytest.raises(FrameError, match="the file ends"):
        list(frames.read(io.BytesIO(data[:-1]), max_bytes=1000))


def test_unknown_version_says_what_to_do():
    newer = bytearray(GOLDEN)
    newer[4] = 2
    with pytest.raises(FrameError, match="expected format version 1, got 2; update"):
        frames.decode(bytes(newer))


def test_a_header_that_is_no_map_is_refused():
    for packed in (b"\x01", b"\x93\x01\x02\x03", b"\xc1", b"\x81\x01\x02", b"\x91" * 2000):
        content = frames.PREFIX.pack(b"STLH", 1, 7, len(packed), 0) + packed
        with pytest.raises(FrameError):
            frames.decode(signed(content))


@given(st.binary(max_size=200))
def test_random_bytes_end_in_a_wire_error_only(data):
    for candidate in (data, b"STLH\x01\x07" + data, signed(b"STLH\x01\x07" + data)):
        with pytest.raises(WireError):
            frames.decode(candidate)
