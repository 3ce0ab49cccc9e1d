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
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ondevice import photos
from ondevice.photos import RENAME, Remark
from wire import classes, seeds
from wire.errors import DataError

PAD = 4  # pixels on each side of the image that a crop may reach into
# Streams of a seed; the payload codecs draw from low numbers of the same seed.
_HOLDOUT, _SHUFFLE, _VIEW, _AUGMENT = 1 << 61, 1 << 62, 3 << 61, 1 << 63
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
        summary: how many images there are of each class, in words.
        remarks: what else there is to know, of what was left out above all.
    """

    x: Pixels
    y: Indices
    digest: str
    names: tuple[str, ...] = ()
    source: str = "images"
    summary: str = ""
    remarks: tuple[Remark, ...] = ()

    def tell(self, log: logging.Logger) -> None:
        """Write to a log what was read and what was left out."""
        photos.tell(log, self.source, [Remark(self.summary), *self.remarks])

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
                    f"{self.source}: {fault}; {RENAME}, or begin a run whose `classes` names it"
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
            DataError: the images have another size or another number of channels.
        """
        height, width, channels = self.x.shape[1:]
        if (channels, height, width) != tuple(input_shape):
            c, h, w = input_shape
            raise DataError(
                f"{self.source}: expected {h}x{w} images with {c} channels, got {height}x{width} "
                f"with {channels}; resize them (a folder of images is resized by itself), or set "
                "the agent's `image` and the artifact to this size"
            )


def load(
    path: Path,
    *,
    input_shape: tuple[int, ...],
    bad_share: float = photos.BAD_SHARE,
) -> ImageSet:
    """Read an `.npz` or a folder of images, as `ondevice.photos` says.

    An `.npz` must have the right size already; a folder's pictures are resized to H x W (bilinear,
    aspect ratio not kept). Its classes are numbered in the order of their sorted names; a run
    numbers them anew (`ImageSet.labelled`).

    Args:
        path: the file or folder.
        input_shape: (C, H, W) of the model's input.
        bad_share: more damaged pictures of a folder than this share are an error.

    Raises:
        DataError: the images or labels are missing, unreadable, or do not fit.
    """
    read = photos.read(path, input_shape, bad_share=bad_share)
    x, y = read.x, read.y
    remarks = list(read.remarks())
    if not read.names:
        remarks.append(
            Remark(
                "no names of classes: labels go by their number",
                "write an array 'classes' of names into it; a run then finds its classes by name",
            )
        )
    images = ImageSet(
        x,
        y,
        digest(x, y, read.names),
        read.names,
        str(path),
        summary=read.summary,
        remarks=tuple(remarks),
    )
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
