"""Damaged pictures and `.npz` files: each must end as pixels, or as a reason in one line.

    python -m tests.attacks.corrupt_images --inputs 100000 --seed 0

Small pictures of every format that is read (with EXIF, profiles, palettes, frames and tiles) and
small archives are damaged: bytes are flipped, set, zeroed, cut out or doubled, the end is cut off,
a number of EXIF is replaced by a hostile one. In most PNG files the checksums are corrected, since
otherwise only their check would ever be reached.

Prints how many inputs ended how. If one ends otherwise, the exit code is 1, and the input is
printed in hexadecimal.
"""

import io
import random
import struct
import sys
import tempfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from ondevice import photos
from ondevice.photos import picture
from ondevice.photos.record import reason
from tests.attacks import command
from wire.errors import DataError

SIZE = (16, 16)
# EXIF entries: tag, type (2 text, 3 short, 4 long, 5 rational, 7 undefined), count, value.
HOSTILE = (
    (0x0112, 2, 4, 0x363636), (0x0112, 3, 9, 0), (0x0112, 5, 1, 8), (0x0112, 12, 1, 8),
    (0x011A, 2, 4, 0x7A7A7A), (0x011A, 5, 1, 0), (0x011A, 3, 1, 72), (0x011A, 5, 2**31, 0),
    (0x0128, 2, 4, 0x616161), (0x0128, 7, 4, 2), (0x8769, 2, 4, 8), (0x8769, 4, 1, 8),
    (0x8825, 4, 1, 2**32 - 1), (0xA005, 4, 1, 8), (0x9286, 7, 2**31, 8), (0x0112, 0, 1, 6),
    (0x0112, 99, 1, 6), (0x0112, 3, 1, 6), (0x014A, 4, 1, 8), (0x927C, 7, 4, 0),
)  # fmt: skip


def exif(entries: tuple[tuple[int, int, int, int], ...]) -> bytes:
    """An EXIF block with one directory of these entries."""
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + table + bytes(4) + struct.pack("<II", 72, 1) + bytes(40)


def corpus() -> list[tuple[str, bytes]]:
    """Pictures and archives with the suffixes of their files."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8))
    smooth = rgb.resize((200, 160))
    deep = Image.fromarray(rng.integers(0, 65536, (24, 20), np.uint16))
    clear = rgb.convert("RGBA")
    clear.putalpha(100)
    turned = exif(((0x0112, 3, 1, 6), (0x011A, 5, 1, 38), (0x0128, 3, 1, 2), (0x8769, 4, 1, 8)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds = [
        (rgb, "jpeg", {"exif": turned}), (smooth, "jpeg", {"progressive": True, "dpi": (72, 72)}),
        (smooth, "jpeg", {"icc_profile": profile}), (rgb.convert("L"), "jpeg", {"exif": turned}),
        (rgb.convert("CMYK"), "jpeg", {}), (rgb, "mpo", {"save_all": True, "append_images": [rgb]}),
        (rgb, "png", {"exif": turned}), (deep, "png", {}), (clear, "png", {"dpi": (72, 72)}),
        (rgb.convert("P"), "png", {"transparency": 3}), (rgb.convert("1"), "png", {}),
        (rgb, "png", {"save_all": True, "append_images": [smooth.resize((20, 24))]}),
        (rgb, "webp", {"exif": turned}), (clear, "webp", {"lossless": True, "exif": turned}),
        (rgb, "webp", {"save_all": True, "append_images": [clear], "xmp": b"<x/>"}),
        (rgb, "bmp", {}), (rgb.convert("P"), "bmp", {}), (rgb.convert("1"), "bmp", {}),
        (rgb, "gif", {}), (rgb, "gif", {"save_all": True, "append_images": [smooth]}),
        (rgb, "tiff", {}), (deep, "tiff", {"compression": "tiff_deflate"}),
        (rgb, "tiff", {"compression": "tiff_lzw", "tiffinfo": {0x0112: 6}}),
        (smooth, "tiff", {"compression": "jpeg"}), (rgb.convert("F"), "tiff", {}),
        (Image.merge("LAB", rgb.split()), "tiff", {}), (rgb.convert("I"), "tiff", {}),
        (rgb.convert("1"), "tiff", {"compression": "group4"}),
        *([(rgb, "avif", {"exif": turned})] if ".avif" in picture.suffixes() else []),
    ]  # fmt: skip
    found = []
    for image, kind, options in kinds:
        with io.BytesIO() as buffer:
            image.save(buffer, kind, **options)
            found.append((f".{kind}".replace("mpo", "jpg"), buffer.getvalue()))
    entries = (HOSTILE[at : at + 4] for at in range(0, len(HOSTILE), 2))
    for each in entries:
        with io.BytesIO() as buffer:
            rgb.save(buffer, "webp", exif=exif(each))
            found.append((".webp", buffer.getvalue()))
        with io.BytesIO() as buffer:
            rgb.save(buffer, "jpeg", exif=exif(each))
            found.append((".jpg", buffer.getvalue()))
    strip = next(data for suffix, data in found if suffix == ".webp")
    x = rng.integers(0, 256, (6, 4, 4, 3), np.uint8)
    arrays = {"x": x, "y": np.arange(6) % 3, "classes": np.array(["a", "b", "c"])}
    packed = {"webp": np.frombuffer(strip, np.uint8), "offsets": np.array([0, len(strip)])}
    for save, given in ((np.savez, arrays), (np.savez_compressed, arrays),
                        (np.savez, packed | {"y": np.zeros(1, int)})):  # fmt: skip
        with io.BytesIO() as buffer:
            save(buffer, **given)
            found.append((".npz", buffer.getvalue()))
    return found


def damaged(suffix: str, whole: bytes, rng: random.Random) -> bytes:
    """A file with one or several kinds of damage."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 4, 12))):
        if not data:
            break
        at = rng.randrange(min(len(data), rng.choice((40, 200, 600, 100_000))))
        length = rng.choice((1, 1, 2, 4, 16, 64))
        match rng.randrange(9):
            case 0 | 1 | 2:
                data[at] ^= 1 << rng.randrange(8)
            case 3:
                data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFF))
            case 4:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case 5:
                data[at : at + length] = rng.randbytes(len(data[at : at + length]))
            case 6:
                del data[at : at + length]
            case 7:
                data[at:at] = data[at : at + length]
            case _:
                del data[max(at, rng.randrange(len(data))) :]
    if suffix == ".png" and rng.random() < 0.9:
        return _summed(bytes(data))
    return bytes(data)


def _summed(data: bytes) -> bytes:
    """The PNG with correct checksums for all chunks that can be read."""
    made, at = bytearray(data[:8]), 8
    while len(data) >= at + 12:
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        if len(data) < at + 12 + length:
            break
        made += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(made + data[at:])


def outcome(file: Path) -> str:
    """How one input ended; raises exceptions that damage does not explain."""
    if file.suffix == ".npz":
        try:
            read = photos.read(file, (3, *SIZE))
        except DataError:
            return "npz: DataError"
        assert read.x.dtype == np.uint8
        assert read.x.ndim == 4
        assert len(read.x) == len(read.y)
        return "npz: read"
    try:
        picture.form(file)
    except picture.damaged():
        has_form = False
    else:
        has_form = True
    try:
        pixels = picture.decode(file, SIZE, 3, Counter())
    except picture.damaged() as fault:
        why = reason(fault)
        assert why
        assert "\n" not in why
        return f"picture: {type(fault).__name__}"
    assert pixels.shape == (*SIZE, 3)
    assert has_form, "its header cannot be read, but it decodes"
    return "picture: decoded"


def attack(count: int, seed: int) -> Counter[str]:
    """How `count` inputs ended.

    Raises:
        AssertionError: an input ended otherwise; the message holds it.
    """
    whole, rng = corpus(), random.Random(seed)
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            suffix, data = rng.choice(whole)
            file = Path(folder, f"p{suffix}")
            file.write_bytes(broken := damaged(suffix, data, rng))
            try:
                ended[outcome(file)] += 1
            except BaseException as fault:
                raise AssertionError(
                    f"input {number} of seed {seed}: {suffix} {broken.hex()}"
                ) from fault
    return ended


if __name__ == "__main__":
    sys.exit(command.run(__doc__, attack, inputs=100_000))
