"""Views of images: crops and flips, the order of an epoch, and the samples left out of it.

Augmentation is the usual one for small images (He et al. 2016, section 4.2): 4 zero pixels on each
side, a random crop of the original size, and a horizontal flip with probability 1/2. The zeros are
added before normalization, as by torchvision's RandomCrop followed by Normalize.

Batches have a fixed size because the compiled training step has fixed shapes. Every batch comes
with the indices of its samples, because teacher logits are matched by index, not by batch number.

Randomness is Philox's raw output (`wire.seeds`): a seed gives the same batches on every machine
and under every numpy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ondevice.images import ImageSet, Indices, Pixels
from wire import seeds

PAD = 4  # pixels on each side of the image that a crop may reach into
# Streams of a seed; the payload codecs draw from low numbers of the same seed.
_HOLDOUT, _SHUFFLE, _VIEW, _AUGMENT = 1 << 61, 1 << 62, 3 << 61, 1 << 63
PLAIN, MIRRORED = 0, 1  # the two views that are not random


class Looks(NamedTuple):
    """The crop and flip of each of N samples; `PAD` zeros surround a sample before the crop.

    Attributes:
        rows, columns: (N,) int64, 0 to 2 PAD, or more if the crop is smaller than the image; where
            the crop begins. `PAD` changes nothing.
        flips: (N,) bool, whether left and right are swapped.
    """

    rows: Indices
    columns: Indices
    flips: NDArray[np.bool_]

    def of(self, chosen: Indices) -> "Looks":
        """The looks of the chosen samples."""
        return Looks(self.rows[chosen], self.columns[chosen], self.flips[chosen])


def looks(view: int, n: int) -> Looks:
    """The looks of `n` samples in a view, in the order of the samples.

    Args:
        view: `PLAIN`, `MIRRORED`, or the seed of random looks.
        n: number of samples.
    """
    if view not in (PLAIN, MIRRORED):
        return drawn(seeds.raw(view, _VIEW, 3 * n))
    middle = np.full(n, PAD)
    return Looks(middle, middle, np.full(n, view == MIRRORED))


def drawn(raw: NDArray[np.uint64], shift: int = PAD, smaller: tuple[int, int] = (0, 0)) -> Looks:
    """Looks from random integers (3 N,): row offsets, then column offsets, then flips.

    Args:
        raw: the integers.
        shift: most pixels that a crop is moved by, up to `PAD`.
        smaller: how many rows and columns a crop is smaller than the image.
    """
    rows, columns, flips = raw.reshape(3, -1)
    down, across = (np.uint64(2 * shift + 1 + less) for less in smaller)
    first = PAD - shift
    return Looks(
        (rows % down).astype(np.int64) + first,
        (columns % across).astype(np.int64) + first,
        (flips & np.uint64(1)).astype(bool),
    )


def held_out(digest: str, n: int, share: float) -> NDArray[np.bool_]:
    """A mask (N,) of the samples that are never trained on; it depends only on the arguments.

    Args:
        digest: digest of the images, see `ImageSet`.
        n: number of images.
        share: share of the images to hold out. If it is over 0 and there are two images or more, at
            least one is held out, and at least one is not.
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

    N counts the samples that are trained on; `holdout` is the share of the images that is left out.
    The last batch is filled up from the head of the same permutation, repeatedly if N < B. Give
    each epoch its own `seed`. With another view than `PLAIN`, all images are shown in that view,
    and `augment` has no effect.
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
    """Number of batches in one pass over `n` samples."""
    return -(-n // batch)


def batches(
    images: ImageSet, batch: int, view: int = PLAIN
) -> Iterator[tuple[Indices, Pixels, int]]:
    """Samples 0..N-1 in order: (indices (B,), pixels uint8 (B, H, W, C), valid).

    Only the first `valid` samples of a batch count. That is all B, except in the last batch, which
    is filled up from sample 0 on.
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
    # Each row is a run of bytes, so that a crop copies width * channels at a time. `crops` has
    # shape (B, 9, 9, H, W C).
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
