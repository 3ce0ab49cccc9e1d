"""People's photos are used as they look, or left out and named."""

import os
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageCms

from ondevice import photos
from ondevice.photos import picture
from orchestrator.datasets import read_path
from tests.attacks.corrupt_images import HOSTILE, exif
from wire.errors import DataError

SHAPE = (3, 32, 32)
RED, RED_GREY = (200, 30, 10), 79
RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


def plain(colour=RED, size=(32, 32)):
    return Image.new("RGB", size, colour)


def folder(path, files=(), **classes):
    """Make a folder with a number of plain pictures for each of `classes`, and further files."""
    for name, number in classes.items():
        (path / name).mkdir(parents=True)
        for i in range(number):
            plain().save(path / name / f"{i}.png")
    for name, content in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def pixels(file, channels=3):
    """A picture's pixels, and its conversions; checks that the server's reader agrees."""
    done = Counter()
    found = picture.decode(file, (32, 32), channels, done)
    seen = read_path(file.parents[1], size=(32, 32), channels=channels)
    assert np.array_equal(seen.x[0], found)
    return found, [*done]


def remarks(read):
    return " / ".join(what for what, _ in read.remarks())


# Kinds of pictures


def lab(image):
    srgb, other = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, other, "RGB", "LAB"))


COLOURS = {
    "jpg": (plain(), "a.jpg", {}),
    "jpeg in capitals": (plain(), "a.JPEG", {}),
    "jpe": (plain(), "a.jpe", {"format": "JPEG"}),
    "jfif": (plain(), "a.jfif", {"format": "JPEG"}),
    "a phone's several pictures in one": (
        plain(), "a.jpg", {"format": "MPO", "save_all": True, "append_images": [plain("blue")]}
    ),
    "CMYK": (plain().convert("CMYK"), "a.jpg", {}),
    "YCbCr": (plain().convert("YCbCr"), "a.jpg", {}),
    "Lab": (lab(plain()), "a.tif", {}),
    "CMYK tiff": (plain().convert("CMYK"), "a.tiff", {}),
    "bmp": (plain(), "a.bmp", {}),
    "gif": (plain(), "a.gif", {}),
    "palette": (plain().quantize(4), "a.png", {}),
    "opaque": (plain().convert("RGBA"), "a.webp", {"lossless": True}),
    "png that is called jpg": (plain(), "a.jpg", {"format": "PNG"}),
}  # fmt: skip


@pytest.mark.parametrize(("image", "name", "options"), COLOURS.values(), ids=COLOURS)
def test_pictures_of_every_kind_keep_their_colour(tmp_path, image, name, options):
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name, **options)
    found, done = pixels(tmp_path / "a" / name)
    assert np.abs(found.astype(int) - RED).max() <= 2
    assert done == []
    grey, _ = pixels(tmp_path / "a" / name, channels=1)
    assert np.abs(grey.astype(int) - RED_GREY).max() <= 2


DEEP = {
    "16-bit png": (RAMP.astype(np.uint16), "a.png"),
    "16-bit tiff": (RAMP.astype(np.uint16), "a.tif"),
    "32-bit tiff of 16-bit values": (RAMP.astype(np.int32), "a.tif"),
    "32-bit tiff of 8-bit values": ((RAMP / 257).astype(np.int32), "a.tif"),
    "float tiff to 1": ((RAMP / 65535).astype(np.float32), "a.tif"),
    "float tiff to 255": ((RAMP / 257).astype(np.float32), "a.tif"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("values", "name"), DEEP.values(), ids=DEEP)
def test_deep_grey_is_scaled_and_not_clipped(tmp_path, values, name, channels):
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / name)
    found, done = pixels(tmp_path / "a" / name, channels)
    expected = np.rint(RAMP / 257)[..., None]
    assert np.abs(found - expected).max() <= 1
    assert done == ["of 16 or 32 bits: scaled to 8"]


def test_dark_16_bit_pictures_stay_dark(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((32, 32), 257 * 3, np.uint16)).save(tmp_path / "a" / "a.png")
    assert (pixels(tmp_path / "a" / "a.png", 1)[0] == 3).all()


@pytest.mark.parametrize("value", [-3.0, np.nan, np.inf, 1e9])
def test_floats_of_no_known_range_are_left_out(tmp_path, value):
    root = folder(tmp_path, a=3)
    Image.fromarray(np.full((9, 9), value, np.float32)).save(root / "a" / "x.tif")
    assert "x.tif (has values from" in remarks(photos.read(root, SHAPE))


def half_clear():
    image = plain().convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 16)[None].repeat(32, 0)))
    return image


CLEAR = {
    "RGBA png": (half_clear(), "a.png", {}),
    "RGBA webp": (half_clear(), "a.webp", {"lossless": True}),
    "gif": (half_clear(), "a.gif", {}),
    "tiff": (half_clear(), "a.tif", {}),
    "grey": (half_clear().convert("LA"), "a.png", {}),
    "palette": (half_clear().quantize(4), "a.png", {}),
}


@pytest.mark.parametrize(("image", "name", "options"), CLEAR.values(), ids=CLEAR)
def test_transparent_pixels_are_white(tmp_path, image, name, options):
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / name, **options)
    found, done = pixels(tmp_path / "a" / name, 1)
    assert (found[:, :16] == 255).all()
    assert np.abs(found[:, 16:].astype(int) - RED_GREY).max() <= 1
    assert done == ["transparent: laid on white"]


def test_transparency_of_one_colour_is_seen(tmp_path):
    (tmp_path / "a").mkdir()
    plain().save(tmp_path / "a" / "a.png", transparency=RED)
    assert (pixels(tmp_path / "a" / "a.png")[0] == 255).all()


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.gif", "a.tif"])
def test_of_several_frames_the_first_is_used_and_that_is_said(tmp_path, name):
    root = folder(tmp_path, a=0)
    more = [plain("blue"), plain("white")]
    plain().save(root / "a" / name, save_all=True, append_images=more)
    found, done = pixels(root / "a" / name)
    assert np.abs(found.astype(int) - RED).max() <= 6
    assert done == ["of several frames or pages: the first is used"]
    assert "1 picture of several frames" in remarks(photos.read(root, SHAPE))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_pictures_are_turned_as_a_viewer_turns_them(tmp_path, name, orientation):
    (tmp_path / "a").mkdir()
    stored = np.zeros((16, 32), np.uint8)
    stored[:8, :16] = 255  # bright at the top left
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(stored).convert("RGB").save(tmp_path / "a" / name, exif=tags)
    seen = np.asarray(picture.open_image(tmp_path / "a" / name).convert("L")) > 128
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1),
              8: (-1, 0)}[orientation]  # fmt: skip
    assert seen.shape == ((16, 32) if orientation < 5 else (32, 16))
    assert seen[corner]
    assert seen.mean() == pytest.approx(0.25, abs=0.02)
    assert photos.sizes(tmp_path).sizes == {seen.shape: 1}


# Damage


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
@pytest.mark.parametrize("entry", HOSTILE, ids=str)
def test_a_picture_whose_exif_alone_is_damaged_is_used(tmp_path, kind, entry):
    root = folder(tmp_path, a=0)
    resolution_as_text = (0x011A, 2, 4, 0x7A7A7A)
    for number, entries in enumerate([(entry,), (entry, (0x0112, 3, 1, 6)),
                                      (resolution_as_text, entry)]):  # fmt: skip
        plain().save(root / "a" / f"{number}.{kind}", exif=exif(entries))
    read = photos.read(root, SHAPE)
    assert len(read.y) == 3
    assert np.abs(read.x.astype(int) - RED).max() <= 4


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side):
    """A PNG that declares side x side pixels, but has none."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg():
    with tempfile.SpooledTemporaryFile() as buffer:
        noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(buffer, "jpeg")
        buffer.seek(0)
        return buffer.read()


BAD = {
    "empty": (b"", "is empty"),
    "cut": (jpeg()[:900], "truncated"),
    "text": (b"hello", "is of no known format"),
    "heic by content": (b"\0\0\0\x18ftypheic" + bytes(40), "is of no known format"),
    "bomb": (bomb(100_000), "decompression bomb"),
    "large": (bomb(10_000), "100,000,000 pixels, more than"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
}


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".webp", ".tif"])
@pytest.mark.parametrize(("content", "why"), BAD.values(), ids=BAD)
def test_a_bad_picture_is_left_out_counted_and_named(tmp_path, content, why, suffix):
    root = folder(tmp_path, [(f"nut/bad{suffix}", content)], bolt=12, nut=12)
    read = photos.read(root, SHAPE)
    assert read.y.tolist() == [0] * 12 + [1] * 12
    assert len(read.x) == 24
    told = remarks(read)
    assert f"1 of 25 pictures left out as damaged: nut/bad{suffix} (" in told
    assert why in told
    with pytest.raises(DataError, match=f"nut/bad{suffix} .*replace or remove"):
        photos.read(root, SHAPE, bad_share=0)
    assert len(read_path(root, size=(8, 8)).y) == 24


def test_what_a_picture_declares_costs_no_memory(tmp_path):
    root = folder(tmp_path, [("a/bomb.png", bomb(100_000)), ("a/large.png", bomb(13_000))], a=38)
    code = (
        "import sys, resource; from pathlib import Path; from ondevice import photos\n"
        "read = photos.read(Path(sys.argv[1]), (3, 32, 32))\n"
        "print(len(read.y), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for name in ("with", "without"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(root)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        number, peak = map(int, done.stdout.split())
        assert number == 38, name
        peaks.append(peak)
        for file in root.glob("a/*[a-z].png"):
            file.unlink()
    assert peaks[0] - peaks[1] < 30_000  # KiB; 13,000 x 13,000 pixels take 660,000


def test_more_bad_pictures_than_the_share_are_an_error(tmp_path):
    bad = [(f"a/bad{i}.jpg", b"") for i in range(5)]
    root = folder(tmp_path, bad, a=95)
    assert len(photos.read(root, SHAPE).y) == 95
    (root / "a" / "bad5.jpg").touch()
    told = r"at most 5 % .* got 6 of 101: a/bad0\.jpg \(is empty\), .*, \.\.\.; replace or remove"
    with pytest.raises(DataError, match=told):
        photos.read(root, SHAPE)
    assert len(photos.read(root, SHAPE, bad_share=0.06).y) == 95


def test_one_bad_picture_keeps_nobody_out_unless_all_are_bad(tmp_path):
    root = folder(tmp_path, [("a/bad.jpg", b"")], a=2)
    assert len(photos.read(root, SHAPE).y) == 2
    for file in root.glob("a/*.png"):
        file.unlink()
    with pytest.raises(DataError, match="got 1 of 1"):
        photos.read(root, SHAPE, bad_share=1)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    root = folder(tmp_path, a=20)
    os.mkfifo(root / "a" / "pipe.jpg")
    read = photos.read(root, SHAPE)
    assert "a/pipe.jpg (is no regular file)" in remarks(read)


def test_links_are_followed_and_broken_ones_named(tmp_path):
    root = folder(tmp_path / "here", a=20)
    other = folder(tmp_path / "there", b=2)
    (root / "b").symlink_to(other / "b")
    (root / "a" / "link.png").symlink_to(root / "a" / "0.png")
    (root / "a" / "gone.png").symlink_to(root / "a" / "nowhere.png")
    read = photos.read(root, SHAPE)
    assert read.counts == {"a": 21, "b": 2}
    assert "a/gone.png (No such file or directory)" in remarks(read)
    (root / "b").unlink()
    (root / "b").symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=r"b: cannot be read .*may be a class"):
        photos.read(root, SHAPE)


def test_large_photos_are_read_one_at_a_time(tmp_path):
    root = folder(tmp_path, a=0)
    for number in range(6):
        plain(size=(4000, 3000)).save(root / "a" / f"{number}.jpg")
    code = (
        "import sys, resource; from pathlib import Path; from ondevice import photos\n"
        "assert len(photos.read(Path(sys.argv[1]), (3, 32, 32)).y) == int(sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for number in (6, 1):
        for file in sorted(root.glob("a/*"))[number:]:
            file.unlink()
        done = subprocess.run([sys.executable, "-c", code, str(root), str(number)],
                              capture_output=True, text=True, check=True)  # fmt: skip
        peaks.append(int(done.stdout))
    assert peaks[0] - peaks[1] < 20_000  # KiB; each picture takes 36,000 when decoded at full size


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_large_picture_is_made_small_first_and_looks_the_same(tmp_path, monkeypatch, mode):
    smooth = np.add.outer(np.arange(600), np.arange(700)) * 255 // 1300
    grey = Image.fromarray(smooth.astype(np.uint8))
    if mode == "I;16":
        large = Image.fromarray((smooth * 257).astype(np.uint16))
    else:
        large = grey.convert(mode)
    path = tmp_path / "a.tiff"
    large.save(path)
    plain = picture.decode(path, (32, 32), 3, Counter())
    monkeypatch.setattr(picture, "LARGE", 1000)
    reduced = picture.decode(path, (32, 32), 3, Counter())
    assert np.abs(plain.astype(int) - reduced).max() <= 4
    assert (mode == "I;16") == np.array_equal(plain, reduced)


def test_a_pipe_in_place_of_images_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "images.npz")
    with pytest.raises(DataError, match="got neither"):
        photos.read(tmp_path / "images.npz", (3, 32, 32))
