"""Cuts data sets into one shard for each device, for simulations, demonstrations and tests.

Real fleets have their own images and need none of this. `python -m orchestrator.datasets --help`
is the command; `build` does the same from Python; `partition` only deals out indices.

The files are listed below. The same arguments always deal out the same samples, and on the same
machine write the same bytes.

    device-0.npz ...  x uint8 (N, H, W, C), y int64 (N,), classes (names): what an agent loads
    heldout.npz       the same for samples that no device has
    split.json        source, seed, samples of each class on each device, SHA-256 of every file
    split.png         the split as a picture
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from orchestrator.datasets.files import Images, parse_size, read_path
from orchestrator.datasets.partition import MIN_SAMPLES, Split, partition
from orchestrator.datasets.picture import draw
from orchestrator.datasets.sources import NAMED, read
from wire.errors import DataError

__all__ = [
    "NAMED", "Images", "Shard", "Shards", "Split", "build", "parse_size", "partition", "read",
    "read_path",
]  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One written file: its name, number of samples in all and of each class, and SHA-256."""

    file: str
    samples: int
    counts: list[int]
    sha256: str


@dataclass(frozen=True)
class Shards:
    """A split on disk; `split.json` holds exactly this."""

    source: str
    source_sha256: str
    split: Split
    alpha: float | None
    seed: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    devices: tuple[Shard, ...]
    heldout: Shard


def build(
    source: str,
    out: Path,
    *,
    devices: int,
    per_device: int | None = None,
    split: Split = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    heldout: Path | None = None,
    heldout_samples: int | None = None,
    min_samples: int = MIN_SAMPLES,
    cache: Path = Path("data"),
) -> Shards:
    """Read a source, deal its training set out to devices, and write the folder `out`.

    Args:
        source: a name in `NAMED`, or the path of an `.npz` or an image folder.
        out: the folder to write; it is created if missing.
        devices: how many shards.
        per_device: samples in each; None deals out all.
        split: `iid` or `dirichlet`; see `partition`.
        alpha: concentration of the Dirichlet.
        seed: seeds the cut, the split and the choice of held-out samples.
        size: height and width; None keeps the source's (digits: 32 x 32), and then a folder's
            pictures must all have one size.
        channels: 1 or 3; None keeps the source's (digits: 3).
        heldout: path of the held-out set, if `source` is a path and there is one.
        heldout_samples: keep this many held-out samples, drawn at random; None keeps all.
        min_samples: the least a device may get.
        cache: where torchvision keeps its downloads.

    Raises:
        DataError: this split cannot be made; nothing was written.
    """
    if heldout_samples is not None and heldout_samples < 1:
        raise DataError(f"expected at least 1 held-out sample, got {heldout_samples}")
    if channels not in (None, 1, 3):
        raise DataError(f"--channels: expected 1 (grey) or 3 (RGB), got {channels}")
    stale = [f for f in out.glob("device-*.npz") if f.name not in map(_file, range(devices))]
    if stale:
        raise DataError(
            f"{out}: {len(stale)} shards of an earlier split with more devices are here "
            f"({min(stale).name}, ...); remove them, or write to another folder"
        )
    train, test = read(
        source, heldout=heldout, cache=cache, seed=seed, size=size, channels=channels
    )
    dealt = partition(
        train.y,
        devices,
        split=split,
        alpha=alpha,
        seed=seed,
        per_device=per_device,
        min_samples=min_samples,
    )
    if heldout_samples is not None and heldout_samples < len(test.y):
        chosen = np.random.RandomState(seed).permutation(len(test.y))[:heldout_samples]
        test = test.take(chosen)
    resized_test = test.resized(size, channels)
    out.mkdir(parents=True, exist_ok=True)
    shards = Shards(
        source=source if source in NAMED else Path(source).name,
        source_sha256=train.digest(),
        split=split,
        alpha=alpha if split == "dirichlet" else None,
        seed=seed,
        shape=(resized_test.x.shape[1], resized_test.x.shape[2], resized_test.x.shape[3]),
        classes=train.classes,
        devices=tuple(
            _write(out / _file(k), train.take(indices).resized(size, channels))
            for k, indices in enumerate(dealt)
        ),
        heldout=_write(out / "heldout.npz", resized_test),
    )
    (out / "split.json").write_text(_json(shards))
    counts = np.array([shard.counts for shard in shards.devices])
    how = "iid" if split == "iid" else f"Dirichlet, \N{GREEK SMALL LETTER ALPHA} = {alpha:g}"
    title = f"{shards.source} on {devices} device{'s' if devices > 1 else ''}: {how}"
    draw(counts, shards.classes, title, out / "split.png")
    return shards


def _json(shards: Shards) -> str:
    """JSON with one line for each setting and file, so that diff can compare two splits."""
    record = asdict(shards)
    files = ",\n  ".join(json.dumps(shard) for shard in record["devices"])
    lines = [
        f'"{key}": [\n  {files}\n ]' if key == "devices" else f'"{key}": {json.dumps(value)}'
        for key, value in record.items()
    ]
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def _file(device: int) -> str:
    return f"device-{device}.npz"


def _write(path: Path, images: Images) -> Shard:
    # numpy dates every member of the archive 1980-01-01, so the bytes depend only on the arrays.
    try:
        np.savez_compressed(path, x=images.x, y=images.y, classes=np.array(images.classes))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return Shard(path.name, len(images.y), images.counts(), sha)
