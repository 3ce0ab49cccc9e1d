"""Labelled images in memory, and from files: packed or plain `.npz`, or a folder."""

import io
import itertools
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edge_agent import data
from edge_agent.data import checked_names, fit, image_files, open_image, stored_names
from wire import classes
from wire.errors import DataError


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
        return data.digest(np.ascontiguousarray(self.x), self.y)

    def labelled(self, names: tuple[str, ...]) -> "Images":
        """The same with labels that index `names`, among which all of `classes` are.

        Raises:
            ValueError: one is not; the text tells both lists.
        """
        places = np.array(classes.places(self.classes, names), np.int64)
        return Images(self.x, places[self.y], names)

    def resized(self, size: tuple[int, int] | None, channels: int | None) -> "Images":
        """The images at height x width `size` (bilinear) with 1 or 3 `channels`; None keeps."""
        size = size or (self.x.shape[1], self.x.shape[2])
        channels = channels or self.x.shape[3]
        if (*size, channels) == self.x.shape[1:]:
            return self
        x = np.empty((len(self.x), *size, channels), np.uint8)
        for source, target in zip(self.x, x, strict=True):
            image = Image.fromarray(source.squeeze(2) if source.shape[2] == 1 else source)
            target[:] = fit(image, size, channels)
        return Images(x, self.y, self.classes)


def read_path(
    path: Path, *, size: tuple[int, int] | None = None, channels: int | None = None
) -> Images:
    """Read one file or folder.

    - `.npz` with `x` uint8 (N, H, W, C) or (N, H, W), `y`, and `classes` (names) if there are any;
    - `.npz` with `webp` (encoded pictures one after another), `offsets`, `y`, `classes`: a picture
      is one square image, or a vertical strip of them;
    - a folder with a sub-folder of images for each class, decoded to height x width `size` and
      `channels`; None takes them from the first image.

    Raises:
        DataError: missing, damaged, or not of these forms.
    """
    if path.is_dir():
        return _folder(path, size, channels)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            stored = dict(arrays)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder; check the path") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(
            f"{path}: expected an .npz without pickled objects, or a folder; got a file that does "
            f"not read ({fault})"
        ) from fault
    if "y" not in stored or not ("x" in stored or {"webp", "offsets"} <= stored.keys()):
        raise DataError(
            f"{path}: expected arrays x and y, or webp, offsets and y; got "
            f"{', '.join(sorted(stored)) or 'none'}"
        )
    x = stored["x"] if "x" in stored else _strips(stored["webp"], stored["offsets"], path)
    x = x[..., None] if x.ndim == 3 else x
    y = stored["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in {1, 3}:
        raise DataError(f"{path}: x: expected uint8 (N, H, W, 1 or 3), got {x.dtype} {x.shape}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or len(y) == 0:
        raise DataError(f"{path}: y: expected {len(x)} integers, got {y.dtype} {y.shape}")
    numbers = np.arange(min(int(y.max()), classes.MAX_CLASSES) + 1)
    names = stored_names(stored.get("classes", numbers), path)
    if y.min() < 0 or y.max() >= len(names):
        raise DataError(
            f"{path}: y: expected labels from 0 to {len(names) - 1} ({len(names)} classes), "
            f"got {y.min()} to {y.max()}"
        )
    return Images(x, y.astype(np.int64), names)


def _strips(blob: NDArray[np.uint8], offsets: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
    data = blob.tobytes()
    pictures: list[NDArray[np.uint8]] = []
    try:
        for start, stop in itertools.pairwise(offsets.tolist()):
            picture = np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))
            pictures.append(picture.reshape(-1, picture.shape[1], picture.shape[1], 3))
        return np.concatenate(pictures)
    except (OSError, ValueError) as fault:
        raise DataError(
            f"{path}: expected strips of square images, got none at picture {len(pictures)} "
            f"({fault}); the file is damaged or of another format"
        ) from fault


def _folder(path: Path, size: tuple[int, int] | None, channels: int | None) -> Images:
    files, names = image_files(path)
    pixels: list[NDArray[np.uint8]] = []
    for file, _ in files:
        image = open_image(file)
        size = size or (image.height, image.width)
        channels = channels or (1 if image.mode in {"1", "L"} else 3)
        pixels.append(fit(image, size, channels))
    y = np.array([label for _, label in files], np.int64)
    return Images(np.stack(pixels), y, checked_names(names, path))
