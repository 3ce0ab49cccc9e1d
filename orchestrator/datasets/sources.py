"""Where the images come from: scikit-learn, torchvision's downloads, a file, or a folder.

Whatever the source, the result is a training set and a held-out set of `Images`. Sources that
state no test set of their own are cut 80/20 in every class, by seed.
"""

import contextlib
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from orchestrator.datasets.partition import stratified
from wire.errors import DataError

HELD_OUT_FRACTION = 0.2
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class Images:
    """Labelled images: `x` uint8 (N, H, W, C), `y` int64 (N,), one name for each class."""

    x: NDArray[np.uint8]
    y: NDArray[np.int64]
    classes: tuple[str, ...]

    def take(self, indices: NDArray[np.int64]) -> "Images":
        """The samples at `indices`, in that order."""
        return Images(self.x[indices], self.y[indices], self.classes)

    def counts(self) -> list[int]:
        """How many samples each class has."""
        return np.bincount(self.y, minlength=len(self.classes)).tolist()

    def digest(self) -> str:
        """SHA-256 of shape, pixels and labels: names the samples and their order."""
        sha = hashlib.sha256(repr(self.x.shape).encode())
        sha.update(np.ascontiguousarray(self.x))
        sha.update(self.y.astype("<i8"))
        return sha.hexdigest()

    def resized(self, size: tuple[int, int] | None, channels: int | None) -> "Images":
        """The images at height x width `size` (bilinear) with 1 or 3 `channels`; None keeps."""
        size = size or (self.x.shape[1], self.x.shape[2])
        channels = channels or self.x.shape[3]
        if (*size, channels) == self.x.shape[1:]:
            return self
        mode = {1: "L", 3: "RGB"}[channels]
        x = np.empty((len(self.x), *size, channels), np.uint8)
        for source, target in zip(self.x, x, strict=True):
            image = Image.fromarray(source.squeeze(2) if source.shape[2] == 1 else source)
            target[:] = _pixels(image, mode, size)
        return Images(x, self.y, self.classes)


def read(
    source: str, *, held_out: Path | None = None, cache: Path = Path("data"), seed: int = 0
) -> tuple[Images, Images]:
    """Read a source whole: (training set, held-out set).

    Args:
        source: a name in `NAMED`, or the path of an `.npz` file or an image folder.
        held_out: the file or folder of the held-out set, for a path.
        cache: where torchvision keeps its downloads.
        seed: for the cut of a source without a test set.

    Raises:
        DataError: the source is unknown, unreadable, or its two halves do not fit together.
    """
    if source in NAMED:
        if held_out is not None:
            raise DataError(
                f"{source} brings its own held-out set, got --heldout {held_out}; leave one out"
            )
        return NAMED[source](cache, seed)
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"source {source!r}: expected one of {', '.join(NAMED)}, or a path; no such path here"
        )
    train = read_path(path)
    if held_out is None:
        return _cut(train, seed)
    test = read_path(held_out)
    if test.classes != train.classes:
        raise DataError(
            f"{held_out}: expected the {len(train.classes)} classes of {path}, "
            f"got {len(test.classes)} ({_some(test.classes)} for {_some(train.classes)}); "
            "give the held-out file of the same data set"
        )
    if test.x.shape[1:] != train.x.shape[1:]:
        test = test.resized((train.x.shape[1], train.x.shape[2]), train.x.shape[3])
    return train, test


def read_path(path: Path) -> Images:
    """Read one file or folder.

    - `.npz` with `x` uint8 (N, H, W, C) or (N, H, W), `y`, and `classes` (names) if there are any;
    - `.npz` with `webp` (encoded pictures one after another), `offsets`, `y`, `classes`: a picture
      is one square image, or a vertical strip of them;
    - a folder with a sub-folder of images for each class; all become the size of the first.

    Raises:
        DataError: missing, damaged, or not of these forms.
    """
    if path.is_dir():
        return _folder(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = dict(arrays)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder; check the path") from None
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        raise DataError(f"{path}: not a readable .npz without pickled objects ({e})") from e
    if "y" not in stored or not ("x" in stored or {"webp", "offsets"} <= stored.keys()):
        raise DataError(
            f"{path}: expected arrays x and y, or webp, offsets and y; got {sorted(stored)}"
        )
    x = stored["x"] if "x" in stored else _strips(stored["webp"], stored["offsets"], path)
    x = x[..., None] if x.ndim == 3 else x
    y = stored["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3):
        raise DataError(f"{path}: x: expected uint8 (N, H, W, 1 or 3), got {x.dtype} {x.shape}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or len(y) == 0:
        raise DataError(f"{path}: y: expected {len(x)} integers, got {y.dtype} {y.shape}")
    names = stored.get("classes", np.arange(int(y.max()) + 1))
    if y.min() < 0 or y.max() >= len(names):
        raise DataError(
            f"{path}: y: expected labels from 0 to {len(names) - 1} ({len(names)} classes), "
            f"got {y.min()} to {y.max()}"
        )
    return Images(x, y.astype(np.int64), tuple(str(name) for name in names))


def _strips(blob: NDArray[np.uint8], offsets: NDArray[np.int64], path: Path) -> NDArray[np.uint8]:
    data, pictures = blob.tobytes(), []
    try:
        for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
            picture = np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))
            pictures.append(picture.reshape(-1, picture.shape[1], picture.shape[1], 3))
        return np.concatenate(pictures)
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: picture {len(pictures)} is not a strip of squares ({e})") from e


def _folder(path: Path) -> Images:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    if not files:
        raise DataError(
            f"{path}: expected a sub-folder of images ({', '.join(sorted(SUFFIXES))}) for each "
            f"class, got {len(folders)} sub-folders without any"
        )
    pixels = []
    size, mode = (0, 0), "L"
    for file, _ in files:
        try:
            with Image.open(file) as image:
                if not pixels:
                    upright = ImageOps.exif_transpose(image)
                    size, mode = (upright.height, upright.width), "RGB"
                    mode = "L" if image.mode in ("1", "L") else "RGB"
                pixels.append(_pixels(image, mode, size))
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            raise DataError(f"{file}: not a readable image ({e}); remove or replace it") from e
    labels = np.array([label for _, label in files], np.int64)
    return Images(np.stack(pixels), labels, tuple(folder.name for folder in folders))


def _pixels(image: Image.Image, mode: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    upright = ImageOps.exif_transpose(image).convert(mode)
    resized = upright.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.uint8).reshape(*size, -1)


def _cut(images: Images, seed: int) -> tuple[Images, Images]:
    rest, held = stratified(images.y, HELD_OUT_FRACTION, seed=seed)
    return images.take(rest), images.take(held)


def _some(names: tuple[str, ...]) -> str:
    return "/".join(names[:3]) + ("/..." if len(names) > 3 else "")


def _digits(_cache: Path, seed: int) -> tuple[Images, Images]:
    """Scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, as 32x32 RGB."""
    from sklearn.datasets import load_digits

    levels, y = load_digits(return_X_y=True)
    grey = np.rint(levels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    images = Images(grey, y.astype(np.int64), tuple("0123456789"))
    return _cut(images.resized((32, 32), 3), seed)


def _torchvision(name: str, cache: Path, **options: Any) -> tuple[Images, Images]:
    """A data set class of torchvision, downloaded into `cache` unless it is there already."""
    _define_vision_schemas()
    from torchvision import datasets

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train, test = (
                getattr(datasets, name)(str(cache), train=part, download=True, **options)
                for part in (True, False)
            )
    except (OSError, RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__
        raise DataError(
            f"{name}: torchvision could not download or read it in {cache} ({reason}); connect "
            "this machine, copy a download from another machine there, or pack the set into an "
            ".npz with x and y and give its path"
        ) from e
    classes = tuple(str(c).removeprefix(f"{i} - ") for i, c in enumerate(train.classes))
    halves = []
    for half in (train, test):
        x = np.asarray(half.data, np.uint8)
        y = np.asarray(half.targets, np.int64)
        halves.append(Images(x[..., None] if x.ndim == 3 else x, y, classes))
    return halves[0], halves[1]


def _emnist(cache: Path, _seed: int) -> tuple[Images, Images]:
    """EMNIST `byclass`, 62 classes. The files hold every image transposed; this turns them."""
    train, test = (
        Images(half.x.transpose(0, 2, 1, 3), half.y, half.classes)
        for half in _torchvision("EMNIST", cache, split="byclass")
    )
    return train, test


_vision_schemas: list[Any] = []  # torch forgets a schema when its Library object dies


def _define_vision_schemas() -> None:
    """Let torchvision be imported beside a torch that cannot load its compiled operators.

    A torchvision wheel of another build than torch's (PyPI's beside a CPU-only torch) fails at
    import with "operator torchvision::nms does not exist": it registers Python rules for two
    operators of a library that did not load. Data sets need neither, so their names suffice.
    """
    import torch

    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise DataError("this data set needs torchvision: pip install 'stillhouse[orchestrator]'")
    if _vision_schemas:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
            return
    except OSError:
        pass
    schemas = torch.library.Library("torchvision", "DEF")
    schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _vision_schemas.append(schemas)


NAMED: Mapping[str, Callable[[Path, int], tuple[Images, Images]]] = {
    "digits": _digits,
    "cifar10": lambda cache, _seed: _torchvision("CIFAR10", cache),
    "cifar100": lambda cache, _seed: _torchvision("CIFAR100", cache),
    "mnist": lambda cache, _seed: _torchvision("MNIST", cache),
    "fashion-mnist": lambda cache, _seed: _torchvision("FashionMNIST", cache),
    "emnist": _emnist,
}
