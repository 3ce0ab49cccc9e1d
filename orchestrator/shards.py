"""Feature shards: what one device sent, decoded once into files that training maps.

A shard is a folder with `features.npy` (N, *shape) float32, `logits.npy` (N, C) float32 and
`labels.npy` (N,) int64, in the order of the device's samples. Mapped files keep the server's memory
that of a batch, whatever the fleet's size.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from orchestrator import admit
from wire import frames, tensors

RECORD_LIMIT = 1 << 26  # bytes; a batch of 32 feature maps of ResNet-8 has 2 MiB in float32


@dataclass(frozen=True)
class Shard:
    """One device's features, logits and labels, as mapped arrays."""

    features: NDArray[np.float32]
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels)


def open_shard(folder: Path) -> Shard:
    """Map a shard that `shelve` wrote."""
    names = ("features", "logits", "labels")
    return Shard(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def shelve(
    payload: Path,
    folder: Path,
    *,
    samples: int,
    shape: tuple[int, ...],
    classes: int,
    spec: str | None = None,
) -> Shard:
    """Decode a features payload into a shard, looking over every record.

    Args:
        payload: file of TENSORS frames, one a batch.
        folder: where the shard goes; one that is there is taken as it is.
        samples: how many the device announced.
        shape: of one feature map.
        classes: of the task.
        spec: the codec that feature maps must have come by; None takes any.

    Raises:
        AdmissionError, WireError: the payload is not `samples` proper samples.
    """
    if folder.exists():
        return open_shard(folder)
    admit.plausible(samples, classes, payload.stat().st_size)
    building = folder.with_suffix(".new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    wanted: dict[str, tuple[Any, tuple[int, ...]]] = {
        "features": (np.float32, (samples, *shape)),
        "logits": (np.float32, (samples, classes)),
        "labels": (np.int64, (samples,)),
    }
    arrays = {
        name: open_memmap(building / f"{name}.npy", mode="w+", dtype=dtype, shape=full)
        for name, (dtype, full) in wanted.items()
    }
    done, values = 0, math.prod(shape) + classes + 1
    agreed = None if spec is None else {"features": spec}
    try:
        with payload.open("rb") as file:
            for frame in frames.read(file, max_bytes=RECORD_LIMIT):
                where = f"features record at sample {done}"
                most = min(2 * samples * values, RECORD_LIMIT // 4)
                record = tensors.unpack(frame, where=where, most=most, spec=agreed)
                admit.features(record, shape, classes, samples - done)
                n = len(record["labels"])
                for name, array in arrays.items():
                    array[done : done + n] = record[name]
                done += n
        admit.complete(done, samples)
    except Exception:
        shutil.rmtree(building)
        raise
    for array in arrays.values():
        array.flush()
    building.rename(folder)
    return open_shard(folder)
