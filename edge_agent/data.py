"""The device's images: read once, checked once, then shuffled, augmented and normalised by batch.

Augmentation is the usual one for small images (He et al. 2016, section 4.2): 4 zero pixels on each
side, a random crop of the original size, a horizontal flip every second time; zeros before
normalisation, as torchvision's RandomCrop then Normalize have it.

Batches have a fixed size because the compiled training step has fixed shapes. Every batch comes
with the indices of its samples: teacher logits are matched by index, never by batch number.

Randomness is Philox's raw output (`wire.seeds`): a seed gives the same batches on every machine
and under every numpy.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from wire import classes, seeds
from wire.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PAD = 4  # pixels on each side of the image that a crop may reach into
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
# Streams of a seed; the payload codecs draw from low numbers of the same seed.
_HOLDOUT, _SHUFFLE, _VIEW, _AUGMENT = 1 << 61, 1 << 62, 3 << 61, 1 << 63
_RENAME = "rename it (a class is a sub-folder, or a name in `classes` of an .npz)"
PLAIN, MIRRORED = 0, 1  # the two views that are not drawn

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        x: uint8 (N, H, W, C).
        y: int64 (N,), from 0.
        digest: SHA-256 (hex) of shape, pixels, labels and the names that these had where the images
            lie: names the samples and their order. `labelled` keeps it.
        names: of the classes, `y` is their place in it; () where labels are numbers alone.
        source: where it came from, for messages.
    """

    x: Pixels
    y: Indices
    digest: str
    names: tuple[str, ...] = ()
    source: str = "images"

    def labelled(self, count: int, names: tuple[str, ...] = ()) -> "ImageSet":
        """These images with labels as a run numbers its classes.

        By name where both sides have names, so that some classes may be missing here; else a label
        is the number itself.

        Args:
            count: how many classes the run has.
            names: theirs, in the order of the logits; () where the run knows numbers alone.

        Raises:
            DataError: a name is not the run's, or names or labels do not fit `count`.
        """
        if names and self.names:
            if names == self.names:
                return self
            try:
                places = classes.places(self.names, names)
            except ValueError as fault:
                raise DataError(
                    f"{self.source}: {fault}; {_RENAME}, or begin a run whose `classes` names it"
                ) from fault
            y = np.array(places, np.int64)[self.y]
            y.setflags(write=False)
            return replace(self, y=y, names=names)
        if self.names and len(self.names) != count:
            raise DataError(
                f"{self.source}: expected {count} classes, got {len(self.names)} "
                f"({classes.listed(self.names)}): the run knows classes by number, so they must be "
                "the same everywhere; name them all in run.toml (classes = [...]), and some may be "
                "missing here"
            )
        if self.y.max() >= count:
            raise DataError(
                f"{self.source}: expected labels from 0 to {count - 1} ({count} classes in the "
                f"run), got {self.y.max()} at sample {self.y.argmax()}; correct the labels, or "
                "`classes` in run.toml"
            )
        return replace(self, names=names or self.names)

    def check_shape(self, input_shape: tuple[int, ...]) -> None:
        """Make sure that a model with input (C, H, W) can take these.

        Raises:
            DataError: size or channels are others.
        """
        height, width, channels = self.x.shape[1:]
        if (channels, height, width) != tuple(input_shape):
            c, h, w = input_shape
            raise DataError(
                f"{self.source}: expected {h}x{w} images with {c} channels, got {height}x{width} "
                f"with {channels}; resize them (a folder of images is resized by itself), or set "
                "the agent's `image` and the artifact to this size"
            )


def load(path: Path, *, input_shape: tuple[int, ...]) -> ImageSet:
    """Read an `.npz` or a folder of images.

    - `.npz`, without pickled objects: `x` uint8 (N, H, W, C) or grey (N, H, W), already of the
      right size; `y` (N,) integers; optionally `classes`, one name for each class: text, bytes
      (UTF-8) or integers.
    - a folder with one sub-folder for each class, numbered in the order of their sorted names
      (an empty one keeps its number): jpg, png, webp and bmp files are decoded, turned upright,
      converted to grey (C = 1) or RGB (C = 3) and resized to H x W (bilinear, aspect ratio not
      kept). Other files and names that begin with a dot are skipped.

    Args:
        path: the file or folder.
        input_shape: (C, H, W) of the model's input.

    Raises:
        DataError: the images or labels are missing, unreadable, or do not fit.
    """
    try:
        is_folder = path.is_dir()
    except OSError as fault:  # a folder above it that this user may not enter
        raise DataError(
            f"{path}: cannot be read ({fault.strerror}); let this user read it"
        ) from fault
    if is_folder:
        x, y, found = _folder(path, input_shape)
        names = checked_names(found, path)
    elif path.exists():
        x, y, names = _npz(path)
    else:
        raise DataError(
            f"{path}: expected an .npz file or a folder of images, got nothing there; check `data` "
            "in the agent's configuration"
        )
    images = ImageSet(x, y, digest(x, y, names), names, str(path))
    x.setflags(write=False)
    y.setflags(write=False)
    images.check_shape(input_shape)
    return images


def digest(x: Pixels, y: Indices, names: tuple[str, ...] = ()) -> str:
    """SHA-256 (hex) of shape, pixels, labels, and names where there are any."""
    sha = hashlib.sha256(repr(x.shape).encode())
    sha.update(x.data)
    sha.update(y.astype("<i8").data)
    sha.update(classes.digest(names).encode())
    return sha.hexdigest()


def checked_names(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Names of classes in Unicode's normal form C.

    Raises:
        DataError: one is empty, too long or not printable, or two are equal.
    """
    try:
        return classes.normalized(names)
    except ValueError as fault:
        raise DataError(f"{path}: {fault}; {_RENAME}") from fault


def stored_names(array: NDArray[Any], path: Path) -> tuple[str, ...]:
    """Names of classes as an `.npz` has them: text, bytes (UTF-8) or integers, (C,).

    Raises:
        DataError: it is none of these, or see `checked_names`.
    """
    if array.ndim != 1 or array.dtype.kind not in "USiu":
        raise DataError(
            f"{path}: classes: expected names (C,) as text, got {array.dtype} {array.shape}; write "
            'classes=numpy.array(["bolt", "nut"]), or leave them out'
        )
    try:
        found = [n.decode() if isinstance(n, bytes) else str(n) for n in array.tolist()]
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path}: classes: expected UTF-8, got {fault.object!r:.80}; {_RENAME}"
        ) from fault
    return checked_names(found, path)


def _npz(path: Path) -> tuple[Pixels, Indices, tuple[str, ...]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = sorted(arrays)
            stored = {name: arrays[name] for name in ("x", "y", "classes") if name in found}
    # What numpy raises for foreign, cut off and pickled files; TypeError is a bare .npy.
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as fault:
        raise DataError(
            f"{path}: expected an .npz file without pickled objects, got one that does not read "
            f"({fault}); write it with numpy.savez(path, x=images, y=labels)"
        ) from fault
    if not {"x", "y"} <= stored.keys():
        raise DataError(
            f"{path}: expected arrays 'x' and 'y', got {', '.join(found) or 'none'}; write it with "
            "numpy.savez(path, x=images, y=labels)"
        )
    x, y = stored["x"], stored["y"]
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
    if len(x) == 0:
        raise DataError(f"{path}: expected images, got none; give this device data")
    names = stored_names(stored["classes"], path) if "classes" in stored else ()
    top = len(names) - 1 if "classes" in stored else np.iinfo(np.int64).max
    if y.min() < 0 or y.max() > top:
        raise DataError(
            f"{path}: expected labels from 0{f' to {top}' if 'classes' in stored else ''}, got "
            f"{y.min()} to {y.max()}; correct y, or the names in 'classes'"
        )
    x = np.ascontiguousarray(x if x.ndim == 4 else x[..., None])
    return x, y.astype(np.int64), names


def _folder(path: Path, input_shape: tuple[int, ...]) -> tuple[Pixels, Indices, tuple[str, ...]]:
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise DataError(
            f"{path}: expected a model with 1 or 3 input channels, got {channels}; a folder holds "
            "grey or colour images, give other data as an .npz"
        )
    files, names = image_files(path)
    x = np.empty((len(files), height, width, channels), np.uint8)
    for pixels, (file, _) in zip(x, files, strict=True):
        # A camera's JPEG is decoded at the nearest smaller scale that suffices.
        pixels[:] = fit(open_image(file, 2 * max(height, width)), (height, width), channels)
    return x, np.array([label for _, label in files], np.int64), names


def image_files(path: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Image files of a folder with their class numbers, and the names of the classes.

    Raises:
        DataError: there is none.
    """
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]
    if not files:
        raise DataError(
            f"{path}: expected one sub-folder of images ({' '.join(SUFFIXES)}) for each class, got "
            f"{len(folders)} sub-folders and no image in them; sort the images into sub-folders"
        )
    return files, tuple(folder.name for folder in folders)


def open_image(file: Path, draft: int | None = None) -> "Image":
    """An image, turned upright; `draft` pixels a side suffice where the decoder can save work.

    Raises:
        DataError: the file does not decode.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if draft:
                image.draft(None, (draft, draft))
            upright = ImageOps.exif_transpose(image)
            upright.load()
            return upright
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as fault:
        raise DataError(
            f"{file}: expected an image, got a file that does not decode ({fault}); replace or "
            "remove it"
        ) from fault


def fit(image: "Image", size: tuple[int, int], channels: int) -> Pixels:
    """Pixels (height, width, channels) of an image as grey (1) or RGB (3), resized (bilinear)."""
    from PIL.Image import Resampling

    converted = image.convert({1: "L", 3: "RGB"}[channels])
    resized = converted.resize((size[1], size[0]), Resampling.BILINEAR)
    return np.asarray(resized, np.uint8).reshape(*size, channels)


@dataclass(frozen=True)
class Preprocess:
    """Normalisation x = (pixel / 255 - mean) / std, one mean and std a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ValueError(
                f"expected as many means as positive deviations, got {self.mean} and {self.std}"
            )

    def __call__(self, pixels: Pixels, out: NDArray[np.float32]) -> None:
        """Write `pixels`, uint8 (B, H, W, C), normalised into `out`, float32 (B, C, H, W).

        One pass converts and transposes, two scale and shift in place. On the x86 core this beats
        a table of the 256 values a channel (np.take) by 1.4.
        """
        scale, shift = self._affine
        np.copyto(out, pixels.transpose(0, 3, 1, 2))
        np.multiply(out, scale, out=out)
        np.add(out, shift, out=out)

    @cached_property
    def _affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, std = np.array(self.mean)[:, None, None], np.array(self.std)[:, None, None]
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


class Looks(NamedTuple):
    """How each of N samples is looked at: a crop of it with `PAD` zeros around, then a flip.

    Attributes:
        rows, columns: (N,) int64, 0 to 2 PAD; where the crop begins, `PAD` for none.
        flips: (N,) bool, whether it is mirrored, left for right.
    """

    rows: Indices
    columns: Indices
    flips: NDArray[np.bool_]

    def of(self, chosen: Indices) -> "Looks":
        """Those of some samples."""
        return Looks(self.rows[chosen], self.columns[chosen], self.flips[chosen])

    @property
    def plain(self) -> bool:
        """Whether samples stay as they are."""
        return bool((self.rows == PAD).all() and (self.columns == PAD).all()) and not any(
            self.flips
        )


def looks(view: int, n: int) -> Looks:
    """A view of `n` samples: each sample's look, by its number.

    Args:
        view: `PLAIN`, `MIRRORED`, or the seed of looks that are drawn.
        n: how many samples there are.
    """
    if view not in (PLAIN, MIRRORED):
        return drawn(seeds.raw(view, _VIEW, 3 * n))
    middle = np.full(n, PAD)
    return Looks(middle, middle, np.full(n, view == MIRRORED))


def drawn(raw: NDArray[np.uint64]) -> Looks:
    """Looks made of random integers (3 N,): row offsets, then column offsets, then flips."""
    rows, columns, flips = raw.reshape(3, -1)
    places = np.uint64(2 * PAD + 1)
    offsets = (rows % places).astype(np.int64), (columns % places).astype(np.int64)
    return Looks(*offsets, (flips & np.uint64(1)).astype(bool))


def held_out(digest: str, n: int, share: float) -> NDArray[np.bool_]:
    """Which samples are never trained on, (N,): the same for the same data, whoever asks.

    Args:
        digest: of the images, see `ImageSet`.
        n: how many there are.
        share: of them; of two or more, at least one on either side where it is over 0.
    """
    chosen = np.zeros(n, bool)
    if not share or n < 2:
        return chosen
    draw = seeds.raw(int(digest[:15], 16), _HOLDOUT, n).argsort(kind="stable")
    chosen[draw[: min(max(round(share * n), 1), n - 1)]] = True
    return chosen


def epoch(
    images: ImageSet,
    *,
    batch: int,
    seed: int,
    augment: bool,
    view: int = PLAIN,
    holdout: float = 0.0,
) -> Iterator[tuple[Indices, Pixels]]:
    """One pass in random order: (indices (B,), pixels uint8 (B, H, W, C)), ceil(N / B) times.

    The last batch is filled up from the head of the same permutation, and again where N < B.
    `seed` means this epoch: give each epoch its own. Another view than `PLAIN` shows the images
    so, and `augment` is of no effect then. Of N samples `holdout` is the share that is left out.
    """
    shown = looks(view, len(images.y))
    trained = np.flatnonzero(~held_out(images.digest, len(images.y), holdout))
    order = trained[np.argsort(seeds.raw(seed, _SHUFFLE, len(trained)), kind="stable")]
    order = np.resize(order, steps(len(trained), batch) * batch)  # numpy repeats it
    for number, indices in enumerate(order.reshape(-1, batch)):
        pixels = images.x[indices]
        if view != PLAIN:
            pixels = look(pixels, shown.of(indices))
        elif augment:
            pixels = look(pixels, drawn(seeds.raw(seed, _AUGMENT + number, 3 * batch)))
        yield indices, pixels


def steps(n: int, batch: int) -> int:
    """Batches of one pass over `n` samples."""
    return -(-n // batch)


def batches(
    images: ImageSet, batch: int, view: int = PLAIN
) -> Iterator[tuple[Indices, Pixels, int]]:
    """Samples 0..N-1 in order: (indices (B,), pixels uint8 (B, H, W, C), valid).

    Only the first `valid` of a batch count: all B, but in the last one, which is filled up from
    sample 0 on.
    """
    n = len(images.y)
    order, shown = np.resize(np.arange(n), steps(n, batch) * batch), looks(view, n)
    for number, indices in enumerate(order.reshape(-1, batch)):
        pixels = images.x[indices] if view == PLAIN else look(images.x[indices], shown.of(indices))
        yield indices, pixels, min(batch, n - number * batch)


def look(pixels: Pixels, how: Looks) -> Pixels:
    """Crop and flip images, uint8 (B, H, W, C)."""
    count, height, width, channels = pixels.shape
    padded = np.zeros((count, height + 2 * PAD, width + 2 * PAD, channels), np.uint8)
    padded[:, PAD:-PAD, PAD:-PAD] = pixels
    # Rows as runs of bytes: a crop copies width * channels bytes at a time. (B, 9, 9, H, W C)
    lines = padded.reshape(count, height + 2 * PAD, -1)
    crops = sliding_window_view(lines, (height, width * channels), axis=(1, 2))[:, :, ::channels]
    chosen: Pixels = crops[np.arange(count), how.rows, how.columns].reshape(pixels.shape)
    mirrored = np.flatnonzero(how.flips)
    straight = chosen[mirrored]
    flipped = np.empty_like(straight)
    for c in range(channels):  # a channel at a time is 4x faster than reversing 3-byte pixels
        flipped[..., c] = straight[:, :, ::-1, c]
    chosen[mirrored] = flipped
    return chosen
