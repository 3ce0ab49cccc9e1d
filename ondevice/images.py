"""Labelled images: read once, checked once, named by a digest, and normalized batch by batch."""

import hashlib
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ondevice import photos
from ondevice.photos import RENAME, Remark
from wire import classes
from wire.errors import DataError

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Labelled images.

    Attributes:
        x: uint8 (N, H, W, C).
        y: int64 (N,), from 0.
        digest: SHA-256 (hex) of shape, pixels, labels and class names as they were read. It
            identifies the samples and their order; `labelled` does not change it.
        names: class names, indexed by `y`; () if labels are only numbers.
        source: where the images came from, for messages.
        summary: how many images there are of each class, in words.
        remarks: other things to know, such as what was left out.
    """

    x: Pixels
    y: Indices
    digest: str
    names: tuple[str, ...] = ()
    source: str = "images"
    summary: str = ""
    remarks: tuple[Remark, ...] = ()

    def tell(self, log: logging.Logger) -> None:
        """Log what was read and what was left out."""
        photos.tell(log, self.source, [Remark(self.summary), *self.remarks])

    def labelled(self, count: int, names: tuple[str, ...] = ()) -> "ImageSet":
        """These images with labels in the run's numbering of classes.

        If both sides have names, labels are matched by name, and some classes may be missing here.
        Otherwise labels stay as they are.

        Args:
            count: how many classes the run has.
            names: the run's class names, in the order of the logits; () if it has only numbers.

        Raises:
            DataError: the run has no class of that name, or names or labels do not fit `count`.
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
        """Make sure that a model with input (C, H, W) can take these images.

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
    path: Path, *, input_shape: tuple[int, ...], bad_share: float = photos.BAD_SHARE
) -> ImageSet:
    """Read an `.npz` or a folder of images; see `ondevice.photos`.

    An `.npz` must have the right size already; a folder's pictures are resized to H x W (bilinear,
    aspect ratio not kept). Its classes are numbered in the order of their sorted names; a run
    numbers them anew (`ImageSet.labelled`).

    Args:
        path: the file or folder.
        input_shape: (C, H, W) of the model's input.
        bad_share: the share of a folder's pictures that may be damaged; see `ondevice.photos.read`.

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
    """SHA-256 (hex) of shape, pixels, labels and names."""
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

        One pass converts and transposes, two scale and shift in place. On the x86 core this is 1.4
        times as fast as a table of 256 values for each channel (np.take).
        """
        scale, shift = self._affine
        np.copyto(out, pixels.transpose(0, 3, 1, 2))
        np.multiply(out, scale, out=out)
        np.add(out, shift, out=out)

    @cached_property
    def _affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean, std = np.array(self.mean)[:, None, None], np.array(self.std)[:, None, None]
        return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
