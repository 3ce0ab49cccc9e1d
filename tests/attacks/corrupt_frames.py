"""Corrupt TENSORS frames by the million: each must end in a `WireError`, or in a sound array.

    python -m tests.attacks.corrupt_frames --inputs 1000000 --seed 0

A small tensor of every codec is packed, and its frame is damaged: bytes are flipped, set, cut out,
doubled or moved, the lengths in the prefix are corrected or not, a field of the header is replaced
by a hostile one. In nine of ten frames the outer SHA-256 is corrected, since otherwise only the
check of the digest would ever be reached. Receivers say how many values they accept (`most`). They
must never get more, nor any value that is not finite.

Prints how many inputs ended how. If one ends otherwise, the exit code is 1, and the input is
printed in hexadecimal.
"""

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Iterator

import msgpack
import numpy as np

from tests.attacks import command
from wire import frames, tensors
from wire.errors import CodecError, WireError

MOST = 2000
SPECS = (
    "float32", "float16", "identity|q=3", "identity|s=0.3|q=8", "hadamard|q=4",
    "hadamard|s=0.25|q=1", "kashin|q=2", "kashin|s=0.5|q=4", "drive", "eden|b=0.5",
    "eden|b=1.5|mse", "eden|b=5", "relu|q=2", "relu|q=3", "relu|q=4|zstd", "float32|zstd",
    "eden|b=2|zstd",
)  # fmt: skip
HOSTILE = (
    None, True, -1, 0, 1, 2, 7, 8, 255, 4096, 2**31, 2**40, 2**63, 2**64 - 1, -(2**63), 0.0, -0.5,
    float("nan"), float("inf"), "", "x", "raw", "float32", "float64", "object", "uint8", "int64",
    "float32|zstd", "eden|b=8", "eden|b=0.05", "identity|s=0.0001|q=1", "kashin|s=0.0001|q=8|zstd",
    "kashin|q=8", "pickle", "../../x", "\0", "é" * 300, b"", b"\xff" * 40, [], [0], [2**20, 2**19],
    [2**39], [-1, 4], [2**31, 2**31, 2**31], [1] * 9, [3.0], [[]], {}, {"seed": 0}, [None] * 3,
)  # fmt: skip


def corpus() -> list[bytes]:
    """Frames of one to three small tensors."""
    rng = np.random.default_rng(0)
    packed = []
    for spec in SPECS:
        for shape in ((1,), (3, 5), (70,), (1030,)):
            values = np.abs(rng.standard_normal(shape)).astype(np.float32)
            named = [("w", values, spec), ("y", np.arange(3, dtype=np.uint16), "raw")]
            packed.append(tensors.pack(named, seed=5))
    return packed


def damaged(frame: bytes, rng: random.Random) -> bytes:
    """A frame with one or several kinds of damage."""
    magic, version, kind, header_bytes, body_bytes = frames.PREFIX.unpack_from(frame)
    at = frames.PREFIX.size
    header = bytearray(frame[at : at + header_bytes])
    body = bytearray(frame[at + header_bytes : -frames.DIGEST_BYTES])
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        draw = rng.random()
        if draw < 0.35:
            header = bytearray(_rewritten(bytes(header), rng))
        else:
            _scratch(body if draw < 0.85 and body else header, rng)
    if rng.random() < 0.9:  # otherwise the prefix keeps the old lengths
        header_bytes, body_bytes = len(header), len(body)
    content = bytearray(
        frames.PREFIX.pack(magic, version, kind, header_bytes, body_bytes) + header + body
    )
    if rng.random() < 0.05:
        content[rng.randrange(frames.PREFIX.size)] = rng.randrange(256)
    digest = hashlib.sha256(content).digest()
    return bytes(content) + (digest if rng.random() < 0.9 else frame[-frames.DIGEST_BYTES :])


def _scratch(data: bytearray, rng: random.Random) -> None:
    """Flip a bit, or set, cut out, double or move some bytes, in place."""
    if not data:
        return
    at = rng.randrange(min(len(data), rng.choice((4, 8, 10_000))))  # scales come first
    length = rng.choice((1, 1, 2, 4, 8))
    match rng.randrange(6):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF))
        case 2:
            data[at : at + length] = rng.randbytes(len(data[at : at + length]))
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case _:
            data[at : at + length] = rng.choice((b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0" * 8))


def _rewritten(header: bytes, rng: random.Random) -> bytes:
    """The header with a field replaced, removed or added; unchanged if it cannot be read."""
    try:
        fields = msgpack.unpackb(header, raw=False)
    except (ValueError, msgpack.UnpackException):
        return header
    entries = fields.get("tensors") if isinstance(fields, dict) else None
    if not isinstance(entries, list) or not entries or not isinstance(entries[-1], dict):
        return header
    target = rng.choice((fields, *(entry for entry in entries if isinstance(entry, dict))))
    key = rng.choice((*target, "size", "spec", "shape"))
    match rng.randrange(8):
        case 0:
            target.pop(key, None)
        case 1:
            entries.append(dict(rng.choice(entries)))
        case 2:
            target["spec"] = rng.choice(SPECS)
        case 3:
            target["shape"] = [rng.choice((0, 1, 5, 15, 70, 1000)) for _ in range(rng.randrange(4))]
        case _:
            target[key] = rng.choice(HOSTILE)
    return msgpack.packb(fields)


def inputs(count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged frames."""
    whole, rng = corpus(), random.Random(seed)
    for _ in range(count):
        yield damaged(rng.choice(whole), rng)


def outcome(data: bytes) -> str:
    """How one input ended; raises any exception but a `WireError`."""
    try:
        arrays = tensors.unpack(frames.decode(data), where="attack", most=MOST)
    except CodecError as fault:
        text = str(fault)
        stages = (
            "Zstandard",
            "bytes in the frame",
            "NaN or infinity",
            "limit",
            "take",
            "no values",
        )
        return "CodecError: " + next((s for s in stages if s in text), "header")
    except WireError as fault:
        return type(fault).__name__
    size = sum(array.size for array in arrays.values())
    assert size <= MOST, f"{size} values, expected at most {MOST}"
    assert all(np.isfinite(array).all() for array in arrays.values())
    return "decoded"


def attack(count: int, seed: int) -> Counter[str]:
    """How `count` inputs ended.

    Raises:
        AssertionError: an input ended otherwise; the message holds it.
    """
    ended: Counter[str] = Counter()
    for number, data in enumerate(inputs(count, seed)):
        try:
            ended[outcome(data)] += 1
        except BaseException as fault:
            raise AssertionError(f"input {number} of seed {seed}: {data.hex()}") from fault
    return ended


if __name__ == "__main__":
    sys.exit(command.run(__doc__, attack, inputs=1_000_000))
