"""All devices' samples as one sequence, from which the server's training draws batches.

A GPU with room for all samples holds them quantized, as in their shards, and picks out and decodes
each batch itself: no sample crosses the bus twice. Otherwise samples stay in mapped files, and each
batch is read from there.

A convolution commutes with shifts. So if a device has sent the feature maps of its plain and its
mirrored images, the feature map of a cropped image is a crop of one of the two, and a batch can
show each sample under a different look. Outside the image is black, and the feature map of black is
one value a channel, `fill`. The equality fails at the borders of image and crop, one pixel wide for
one 3 x 3 convolution, because there the device's convolution met its own zero padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ondevice.views import PAD, Looks
from orchestrator.training.shards import Shard

SHARE = 0.6  # share of a GPU's free memory that samples may take; the rest is for training


class Batch(NamedTuple):
    """Feature maps (B, *shape) float32, channels last; z_c (B, C) float32; labels (B,) int64.

    `weights` (B,) float32 are the samples' weights in the loss.
    """

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Source:
    """What one device sent.

    Attributes:
        shard: its rows.
        weight: of its samples in the loss.
        fill: the feature map (channels,) of a black image, if the maps can be cropped; else None.
        mirror: (channels,) int64; the map of a mirrored image is the plain map mirrored, with its
            channels in this order. None, where `fill` is not: the first half of the rows shows the
            plain images and the second half the same images mirrored.
        left_out: (N,) bool, true for samples that are not trained on; None: all are trained on.
    """

    shard: Shard
    weight: float = 1.0
    fill: NDArray[np.float32] | None = None
    mirror: NDArray[np.int64] | None = None
    left_out: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.shard) // (2 if self.both_views else 1)

    @property
    def both_views(self) -> bool:
        """Whether there are rows of mirrored images."""
        return self.fill is not None and self.mirror is None


class Samples:
    """The samples of all sources, in the order of the sources.

    Args:
        sources: one or more; their feature maps have one shape and came by one codec.
        device: the device that batches are put on.

    Attributes:
        sources: as given.
        spans: the numbers of each source's samples.
        trained: the numbers of the samples that are trained on.
        shape: of one feature map.
    """

    def __init__(self, sources: Sequence[Source], device: torch.device) -> None:
        self.sources = tuple(sources)
        self._columns, self._device = [each.shard.columns for each in sources], device
        sizes = [len(each) for each in sources]
        starts = np.cumsum([0, *sizes])[:-1].tolist()
        self.spans = [range(start, start + n) for start, n in zip(starts, sizes, strict=True)]
        every = (e.left_out if e.left_out is not None else np.zeros(len(e), bool) for e in sources)
        self.trained = np.flatnonzero(~np.concatenate([*every]))
        self._owner = np.repeat(np.arange(len(sources)), sizes)
        self._starts, self._sizes = np.array(starts), np.array(sizes)
        self._first = np.cumsum([0, *(len(each.shard) for each in sources)])[:-1]
        self._weights = np.array([each.weight for each in sources], np.float32)
        self._both_views = np.array([each.both_views for each in sources])
        self._cropped = np.array([each.fill is not None for each in sources])
        self.shape = self._columns[0]["features"].shape[1:]
        channels = self.shape[0]
        none, same = np.zeros(channels, np.float32), np.arange(channels)
        self._fills = np.stack([none if each.fill is None else each.fill for each in sources])
        self._mirrors = [same if each.mirror is None else each.mirror for each in sources]
        self._resident: dict[str, torch.Tensor] = {}
        if device.type == "cuda" and self._fits():
            for name in self._columns[0]:
                parts = [torch.from_numpy(np.array(columns[name])) for columns in self._columns]
                self._resident[name] = torch.cat([part.to(device) for part in parts])

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._owner)

    def draw(
        self,
        chosen: NDArray[np.int64],
        looks: Looks | None = None,
        size: tuple[int, int] | None = None,
    ) -> Batch:
        """The samples with these numbers, in this order.

        Args:
            chosen: (B,).
            looks: (B,), applied to samples that can be cropped; None shows them plain.
            size: height and width of the crops, if all samples can be cropped (`crops_all`); None:
                those of the maps.
        """
        owner = self._owner[chosen]
        both, cropped = self._both_views[owner], self._cropped[owner]
        rows = chosen - self._starts[owner]
        if looks is not None:
            rows += np.where(both & looks.flips, self._sizes[owner], 0)
        features = _decode(read := self._read(owner, rows))
        if looks is not None and cropped.any():
            # Maps of a single view cannot be cropped: the crop at (PAD, PAD) is the map itself.
            corner = np.where(cropped, looks.rows, PAD), np.where(cropped, looks.columns, PAD)
            looks = Looks(*corner, looks.flips)
            size = size or (features.shape[2], features.shape[3])
            features = _crop(features, looks, size, self._fills[owner], both)
            turned = cropped & ~both & looks.flips
            for number in np.unique(owner[turned]):
                of = torch.from_numpy(np.flatnonzero(turned & (owner == number)))
                mirror = torch.from_numpy(self._mirrors[number])
                features[of] = features[of][:, mirror].flip(3)
        if features.dim() == 4:  # 1.5 to 1.9 times the images a second of NCHW, on two x86 cores
            features = features.contiguous(memory_format=torch.channels_last)
        weights = torch.from_numpy(self._weights[owner]).to(self._device)
        return Batch(features, read["logits"], read["labels"], weights)

    @property
    def crops_all(self) -> bool:
        """Whether the maps of all samples can be cropped."""
        return bool(self._cropped.all())

    def weight(self, chosen: NDArray[np.int64]) -> float:
        """Sum of the weights of the samples with these numbers."""
        return float(self._weights[self._owner[chosen]].sum())

    def _read(self, owner: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """All columns, by name, of row rows[i] of source owner[i] for each i."""
        if self._resident:
            at = torch.from_numpy(self._first[owner] + rows).to(self._device)
            return {name: column[at] for name, column in self._resident.items()}
        owners = np.unique(owner)
        places = [np.flatnonzero(owner == i) for i in owners]
        back = np.concatenate(places).argsort()
        read = {}
        for name in self._columns[0]:
            pieces: list[NDArray[Any]] = [
                self._columns[i][name][rows[where]] for i, where in zip(owners, places, strict=True)
            ]
            read[name] = torch.from_numpy(np.concatenate(pieces)[back]).to(self._device)
        return read

    def _fits(self) -> bool:
        free, _ = torch.cuda.mem_get_info(self._device)
        return sum(a.nbytes for columns in self._columns for a in columns.values()) < SHARE * free


def _decode(columns: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Feature maps (B, *shape) float32: low + step * level, block by block; see `Lattice`."""
    features = columns["features"]
    if "low" in columns:
        low, step = columns["low"], columns["step"]
        rows = features.view(*low.shape, -1).float()
        features = torch.addcmul(low[..., None], rows, step[..., None]).view(features.shape)
    return features


def _crop(
    features: torch.Tensor,
    looks: Looks,
    size: tuple[int, int],
    fills: NDArray[np.float32],
    both: NDArray[np.bool_],
) -> torch.Tensor:
    """Crops (B, C, *size) of feature maps (B, C, H, W), not mirrored.

    A crop of width w at column c of an image, when mirrored, is the crop at W + 2 PAD - w - c of
    the mirrored image. So columns count from the other side where the map is of the mirrored image
    (`both` and flipped).
    """
    count, channels, height, width = features.shape
    device = features.device
    fill = torch.from_numpy(fills).to(device)[:, None, None, :]
    padded = fill.expand(count, height + 2 * PAD, width + 2 * PAD, channels).contiguous()
    padded[:, PAD:-PAD, PAD:-PAD] = features.permute(0, 2, 3, 1)
    last = width + 2 * PAD - size[1]
    left = np.where(both & looks.flips, last - looks.columns, looks.columns)
    rows = torch.from_numpy(looks.rows[:, None] + np.arange(size[0])).to(device)
    columns = torch.from_numpy(left[:, None] + np.arange(size[1])).to(device)
    each = torch.arange(count, device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
