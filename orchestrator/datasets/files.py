"""Labelled images in memory, and reading them from files."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ondevice import images, photos
from wire import classes
from wire.errors import DataError

log = logging.getLogger("orchestrator")
MOST_BYTES = 4 << 30  # limit for all pictures together if nobody has chosen their size


@dataclass(frozen=True)
class Images:
    """Labelled images: `x` uint8 (N, H, W, C), `y` int64 (N,), one name (NFC) for each class."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    classes: tuple[str, ...]

    def take(self, indices: NDArray[np.int64]) -> "Images":
        """The samples at `indices`, in that order."""
        return Images(self.x[indices], self.y[indices], self.classes)

    def counts(self) -> list[int]:
        """How many samples each class has."""
        return [int(n) for n in np.bincount(self.y, minlength=len(self.classes))]

    def digest(self) -> str:
        """SHA-256 of shape, pixels and labels: names the samples and their order."""
        return images.digest(np.ascontiguousarray(self.x), self.y)

    def labelled(self, names: tuple[str, ...]) -> "Images":
        """The same images, with labels that are places in `names`, which must hold all `classes`.

        Raises:
            ValueError: a class is not in `names`; the text shows both lists.
        """
        places = np.array(classes.places(self.classes, names), np.int64)
        return Images(self.x, places[self.y], names)

    def resized(self, size: tuple[int, int] | None, channels: int | None) -> "Images":
        """The images resized to (height, width) and 1 or 3 channels; None keeps what they have."""
        size = size or (self.x.shape[1], self.x.shape[2])
        channels = channels or self.x.shape[3]
        if (*size, channels) == self.x.shape[1:]:
            return self
        x = np.empty((len(self.x), *size, channels), np.uint8)
        for source, target in zip(self.x, x, strict=True):
            image = Image.fromarray(source.squeeze(2) if source.shape[2] == 1 else source)
            target[:] = photos.fit(image, size, channels)
        return Images(x, self.y, self.classes)


def read_path(
    path: Path, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> Images:
    """Read one file or folder, by the same rules as agents (`ondevice.photos`).

    A folder's pictures are resized to (height, width) `size` and converted to `channels`. Without
    `size`, all must have one size. Without `channels`, they are grey if all are grey, else RGB.

    Raises:
        DataError: the path is missing, damaged, or has another form.
    """
    if photos.is_folder(path) and not (size and channels):
        pictures = photos.sizes(path)
        size, channels = size or _one_size(path, pictures), channels or pictures.channels
    read = photos.read(path, (channels or 3, *(size or (0, 0))))
    photos.tell(log, path, read.remarks())
    if read.x.shape[3] not in {1, 3}:
        raise DataError(
            f"{path}: x: expected uint8 (N, H, W, 1 or 3), got {read.x.dtype} {read.x.shape}; "
            "store grey or RGB images, channels last"
        )
    names = read.names
    if not names:
        highest = int(read.y.max())
        if highest >= classes.MAX_CLASSES:
            raise DataError(
                f"{path}: y: expected labels below {classes.MAX_CLASSES}, got {highest}; store "
                "class numbers from 0"
            )
        names = tuple(str(label) for label in range(highest + 1))
    return Images(read.x, read.y, names)


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in a text "HEIGHTxWIDTH".

    Raises:
        DataError: the text has another form.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise DataError(f"--size: expected HEIGHTxWIDTH such as 32x32, got {text!r}")
    return int(height), int(width)


def _one_size(path: Path, pictures: photos.Sizes) -> tuple[int, int]:
    """The size that all pictures have; DataError if there are several, or it is too large."""
    count, number = pictures.sizes.total(), len(pictures.sizes)
    common = pictures.sizes.most_common(3)
    listed = ", ".join(f"{h}x{w} ({n:,})" for (h, w), n in common) + (", ..." * (number > 3))
    side = min(32, *common[0][0])
    advice = f"choose one with --size HEIGHTxWIDTH, such as --size {side}x{side}"
    if number > 1:
        raise DataError(
            f"{path}: expected pictures of one size, got {number:,}: {listed}; {advice}"
        )
    (size,) = pictures.sizes
    needed = size[0] * size[1] * pictures.channels * count
    if needed > MOST_BYTES:
        raise DataError(
            f"{path}: {count:,} pictures of {listed} take {needed / 1e9:,.0f} GB of memory; "
            f"{advice}"
        )
    return size
