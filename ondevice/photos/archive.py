"""An `.npz` of labelled images, without pickled objects.

    x        uint8 (N, H, W, C), or grey (N, H, W)
    y        (N,) integers, from 0
    classes  one name for each class, in the order of the labels; optional

Instead of x it may hold encoded pictures, as some public data sets do:

    webp     uint8, encoded pictures one after another; each is one square image, or a vertical
             strip of several
    offsets  where each picture begins, and where the last one ends
"""

import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.photos.record import DAMAGED, Photos, class_names, reason
from wire.errors import DataError

WRITE = "write it with numpy.savez(path, x=images, y=labels)"
KNOWN = ("x", "y", "classes", "webp", "offsets")


def read(path: Path) -> Photos:
    """Read an `.npz`; see `ondevice.photos.read`."""
    stored, all_names = _arrays(path)
    if "y" not in stored or not ("x" in stored or {"webp", "offsets"} <= stored.keys()):
        raise DataError(
            f"{path}: expected arrays 'x' and 'y' (or webp, offsets and y), got "
            f"{', '.join(all_names) or 'none'}; {WRITE}"
        )
    x = stored["x"] if "x" in stored else _unpack(stored["webp"], stored["offsets"], path)
    y = stored["y"]
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DataError(
            f"{path}: x: expected uint8 (N, H, W, C) or (N, H, W), got {x.dtype} {x.shape}; store "
            "pixels as 0 to 255, channels last"
        )
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(
            f"{path}: y: expected integers (N,), got {y.dtype} {y.shape}; store class numbers"
        )
    if len(x) != len(y):
        raise DataError(
            f"{path}: expected one label for each image, got {len(x)} images and {len(y)} labels; "
            "write both from the same samples"
        )
    if x.size == 0:
        raise DataError(f"{path}: expected images, got none ({x.shape}); give this device data")
    names = _names(stored["classes"], path) if "classes" in stored else ()
    top = len(names) - 1 if names else np.iinfo(np.int64).max
    if y.min() < 0 or y.max() > top:
        raise DataError(
            f"{path}: expected labels from 0{f' to {top}' if names else ''}, got {y.min()} to "
            f"{y.max()}; correct y, or the names in 'classes'"
        )
    x = np.ascontiguousarray(x if x.ndim == 4 else x[..., None])
    return Photos(x, y.astype(np.int64), names)


def _arrays(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """The arrays with names that are known here, and the names of all arrays."""
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")  # numpy's, about files of older versions
            with np.load(file, allow_pickle=False) as arrays:
                names = sorted(arrays)
                return {name: np.asarray(arrays[name]) for name in KNOWN if name in names}, names
    except DAMAGED as fault:  # another kind of file, cut off, pickled, a bare .npy, any damage
        if path.suffix.lower() not in (".npz", ".npy"):
            raise DataError(
                f"{path}: expected a folder with one sub-folder of pictures for each class, or an "
                ".npz file; got a file of another kind"
            ) from fault
        raise DataError(
            f"{path}: expected an .npz file without pickled objects, got one that does not read "
            f"({reason(fault)}); {WRITE}"
        ) from fault


def _names(classes: NDArray[Any], path: Path) -> tuple[str, ...]:
    """The class names: text, bytes (UTF-8) or integers in the file."""
    if classes.ndim != 1 or not len(classes) or classes.dtype.kind not in "USiu":
        raise DataError(
            f"{path}: classes: expected one name for each class, got {classes.dtype} "
            f"{classes.shape}; store them as numpy.array(['bolt', 'nut', ...])"
        )
    try:
        texts = [n.decode() if isinstance(n, bytes) else str(n) for n in classes.tolist()]
        "".join(texts).encode()
    except UnicodeError as fault:
        raise DataError(
            f"{path}: classes: expected names in UTF-8, got others ({reason(fault)}); write the "
            "file again"
        ) from fault
    return class_names(texts, path)


def _unpack(blob: NDArray[Any], offsets: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    from ondevice.photos.picture import damaged

    pictures: list[NDArray[np.uint8]] = []
    try:
        data = blob.tobytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for start, stop in itertools.pairwise(offsets.tolist()):
                picture = Image.open(io.BytesIO(data[start:stop]), formats=("WEBP",))
                pixels = np.asarray(picture.convert("RGB"))
                pictures.append(pixels.reshape(-1, picture.width, picture.width, 3))
        return np.concatenate(pictures)
    except damaged() as fault:
        raise DataError(
            f"{path}: expected strips of square images, got none at picture {len(pictures)} "
            f"({reason(fault)}); the file is damaged or of another format"
        ) from fault
