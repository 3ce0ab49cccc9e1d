"""Turns one picture into pixels: upright, 8 bits, grey (1 channel) or RGB (3).

- Pixels are turned by the EXIF orientation. If EXIF is damaged, they are used as stored.
- Grey of 16 bits is divided by 257. For values of 32 bits, white is assumed to be 1 (floats), 255
  or 65,535: the least of these that no value exceeds. They are scaled to 8 bits.
- Transparent pixels are laid on white. Only the first frame of an animation, or page, is used.
- A picture with more pixels than Pillow's limit is not decoded, because a small file can declare
  any size. A camera's JPEG of up to twice as many is decoded at a smaller scale.
- A picture of over `LARGE` pixels is made smaller before anything else, by whole factors: the rest
  of the work would take several copies of it. 88 million pixels take 390 MB, 550 MB with 16 bits.
"""

import logging
import stat
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ondevice.photos.record import DAMAGED, reason, shown
from wire.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
LARGE = 1 << 24  # pixels
ROWS = 256  # of a large picture, or one of 16 or 32 bits, that are scaled at once
ORIENTATION = 0x0112  # the EXIF tag
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP")


def open_image(file: Path, draft: int | None = None) -> "Image":
    """A picture, upright and without transparency, in a mode that `fit` takes.

    Args:
        file: the picture.
        draft: the decoder may save work by scaling down to sides of this many pixels.

    Raises:
        DataError: the file cannot be decoded.
    """
    try:
        return _open(file, draft, Counter())
    except damaged() as fault:
        raise DataError(
            f"{shown(str(file))}: expected a picture, got a file that does not decode "
            f"({reason(fault)}); replace or remove it"
        ) from fault


def fit(image: "Image", size: tuple[int, int], channels: int) -> Pixels:
    """Pixels (height, width, channels) of an image as grey (1) or RGB (3), resized (bilinear)."""
    from PIL.Image import Resampling

    converted = image.convert({1: "L", 3: "RGB"}[channels])
    resized = converted.resize((size[1], size[0]), Resampling.BILINEAR)
    return np.asarray(resized, np.uint8).reshape(*size, channels)


def decode(file: Path, size: tuple[int, int], channels: int, done: Counter[str]) -> Pixels:
    """Pixels (height, width, channels) of a picture; `done` counts the conversions by their name.

    Raises:
        one of `damaged()`: the file cannot be decoded.
    """
    # A camera's JPEG is decoded at the smallest scale that is large enough.
    return fit(_open(file, 2 * max(size), done), size, channels)


def form(file: Path) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) of a picture when upright, from the file's header.

    Raises:
        one of `damaged()`: the header cannot be read.
    """
    from PIL import Image

    with warnings.catch_warnings(), _regular(file).open("rb") as stream:
        warnings.simplefilter("ignore")
        with Image.open(stream, formats=_formats()) as image:
            if image.format == "TIFF":  # Pillow itself turns these when it decodes them
                image.load()
            height, width = image.height, image.width
            if image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8):
                height, width = width, height
            return height, width, 1 if image.mode[:1] in "1LIF" and image.mode != "LAB" else 3


@cache
def damaged() -> tuple[type[Exception], ...]:
    """The exceptions that a damaged picture may raise."""
    from PIL.Image import DecompressionBombError

    return (*DAMAGED, DecompressionBombError)


@cache
def suffixes() -> tuple[str, ...]:
    """Suffixes of the pictures that this installation of Pillow decodes."""
    from PIL import features

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow does not know these features
        missing = {f".{name}" for name in ("avif", "webp") if not features.check(name)}
    return tuple(suffix for suffix in SUFFIXES if suffix not in missing)


@cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    # Pillow logs the errors that it raises, and every chunk of a file; we report the errors.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(file: Path, draft: int | None, done: Counter[str]) -> "Image":
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings(), _regular(file).open("rb") as stream:
        warnings.simplefilter("ignore")  # about damaged metadata and many pixels
        try:
            image = Image.open(stream, formats=_formats())
        except UnidentifiedImageError:
            raise ValueError("is of no known format, or damaged at its beginning") from None
        with image:
            if draft:
                image.draft(None, (draft, draft))
            pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if most and pixels > most:
                raise ValueError(f"has {pixels:,} pixels, more than {most:,}")
            image.load()
            # Looking for further frames of a GIF destroys the pixels of the first.
            flat, changes = _flat(_smaller(image, draft))
            upright = _turn(flat, _orientation(image))
            several = _several(image)
    done.update([*changes, *(["of several frames or pages: the first is used"] * several)])
    return upright


def _smaller(image: "Image", draft: int | None) -> "Image":
    """The image, reduced if it is large; no side falls below `draft`."""
    from PIL import Image

    if image.format == "GIF":
        return image.copy()
    factor = min(image.width, image.height) // draft if draft else 1
    reducible = image.mode in ("L", "LA", "RGB", "RGBA", "CMYK")
    if image.width * image.height <= LARGE or factor < 2 or not reducible:
        return image
    small = Image.new(image.mode, (-(-image.width // factor), -(-image.height // factor)))
    small.info = dict(image.info)
    rows = factor * max(ROWS // factor, 1)  # not all at once: `reduce` copies what is transparent
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        small.paste(strip.reduce(factor), (0, top // factor))
    return small


def _regular(file: Path) -> Path:
    """The file, if it is a regular one: opening a pipe, say, may wait for ever."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("is no regular file")
    if not status.st_size:
        raise ValueError("is empty")
    return file


def _orientation(image: "Image") -> int:
    """The orientation in EXIF or XMP, 1 to 8; 1 if that is damaged."""
    try:
        tag = image.getexif().get(ORIENTATION, 1)
    except damaged():
        return 1
    return tag if isinstance(tag, int) else 1


def _turn(image: "Image", orientation: int) -> "Image":
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


def _several(image: "Image") -> bool:
    """Whether more frames follow the first; the previews in a camera's JPEG (MPO) do not count."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except damaged():
        return False


def _flat(image: "Image") -> tuple["Image", list[str]]:
    """The image in 8 bits without transparency, and the conversions that this took."""
    from PIL import Image, ImageCms

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image), ["of 16 or 32 bits: scaled to 8"]
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert rgb is not None  # noqa: S101 - None is returned only for work in place
        return rgb, []
    if not image.mode.lower().endswith("a") and "transparency" not in image.info:
        return image, []
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        return layer, []
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer), ["transparent: laid on white"]


def _eight_bits(image: "Image") -> "Image":
    from PIL import Image

    values = np.asarray(image)
    tops = [65535.0]
    # Pillow below 11 opens 16-bit PNG as "I".
    if image.mode in ("I", "F") and image.format != "PNG":
        tops = [*([1.0] if image.mode == "F" else []), 255.0, *tops]
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= tops[-1]:
        raise ValueError(
            f"has values from {low:g} to {high:g}, expected 0 to 1, to 255 or to 65,535"
        )
    scale = 255 / next(top for top in tops if high <= top)
    scaled = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), ROWS):
        rows = values[row : row + ROWS].astype(np.float32)
        scaled[row : row + ROWS] = np.rint(rows * np.float32(scale))
    return Image.fromarray(scaled)
