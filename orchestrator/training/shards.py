"""Feature shards: what one device sent, decoded once into files that training maps.

A shard is a folder with `features.npy` (N, *shape), `logits.npy` (N, C) float32 and `labels.npy`
(N,) int64. It has a row for each of the device's samples, in their order. If the device sent plain
and mirrored maps, the rows of all mirrored samples follow those of all plain ones.

If the codec of the feature maps has levels and a map is whole blocks, the maps stay quantized:
uint8, with `low.npy` and `step.npy` (N, k) for the k blocks of each map (`Lattice`), a quarter of
their size in float32. Otherwise they are float32.
Because files are mapped, the server needs memory for one batch only, whatever the fleet's size.
"""

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from orchestrator.rules import admit
from wire import frames, storage, tensors
from wire.errors import AdmissionError
from wire.tensors import Part

Array = NDArray[Any]
Room = dict[str, np.memmap[Any, Any]]
RECORD_LIMIT = 1 << 26  # bytes; 32 feature maps of ResNet-8 take 2 MiB in float32


@dataclass(frozen=True)
class Shard:
    """One device's rows as mapped arrays; `low` and `step` exist if `features` are levels."""

    features: Array
    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    low: NDArray[np.float32] | None = None
    step: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Number of rows: two a sample if plain and mirrored maps came, else one."""
        return len(self.labels)

    @property
    def columns(self) -> dict[str, Array]:
        """All arrays that exist, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


def open_shard(folder: Path) -> Shard:
    """Map a shard that `shelve` wrote."""
    return Shard(**{path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")})


def shelve(
    payload: Path,
    folder: Path,
    *,
    samples: int,
    shape: tuple[int, ...],
    classes: int,
    spec: str | None = None,
) -> Shard:
    """Decode a features payload into a shard, and check every record.

    Args:
        payload: file of TENSORS frames, one a batch.
        folder: of the shard. If it exists, it is used as it is, and must hold `samples` rows.
        samples: number of rows: as many as the device announced samples, or twice as many if it was
            asked for plain and mirrored maps.
        shape: of one feature map.
        classes: how many classes the task has.
        spec: the codec that feature maps must have come by; None takes any.

    Raises:
        AdmissionError, WireError: the payload is not `samples` proper rows.
        StorageError: the shard cannot be written; StalledError: the disk is full.
    """
    if folder.exists():
        shard = open_shard(folder)
        admit.complete("features", len(shard), samples)
        return shard
    admit.plausible(samples, classes, payload.stat().st_size)
    building = folder.with_suffix(".new")
    agreed = None if spec is None else {"features": spec}
    with storage.at(folder):
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        arrays: Room = {}
        done, values = 0, math.prod(shape) + classes + 1
        try:
            with payload.open("rb") as file:
                for frame in frames.read(file, max_bytes=RECORD_LIMIT):
                    where = f"features record at sample {done}"
                    most = min(2 * samples * values, RECORD_LIMIT // 4)
                    parts = tensors.parts(frame, where=where, most=most, spec=agreed)
                    record = _record(parts)
                    admit.features(record, shape, classes, samples - done)
                    arrays = arrays or _room(building, record, samples)
                    done = _append(record, arrays, done)
            admit.complete("features", done, samples)
        except Exception:
            shutil.rmtree(building)
            raise
        for array in arrays.values():
            array.flush()
        building.rename(folder)
    return open_shard(folder)


def read_logits(payload: Path, *, rows: int, classes: int, spec: str) -> NDArray[np.float32]:
    """The logits (rows, classes) of a payload "logits", its records joined.

    Raises:
        AdmissionError, WireError: it is not `rows` proper logits.
    """
    read: list[Array] = []
    done = 0
    with payload.open("rb") as file:
        for frame in frames.read(file, max_bytes=RECORD_LIMIT):
            where = f"logits record at sample {done}"
            most = (rows - done) * classes
            parts = tensors.parts(frame, where=where, most=most, spec={"logits": spec})
            record = {name: part.array() for name, part in parts.items()}
            admit.logits(record, classes, rows - done)
            read.append(record["logits"])
            done += len(record["logits"])
    admit.complete("logits", done, rows)
    return np.concatenate(read)


def _record(parts: Mapping[str, Part]) -> dict[str, Array]:
    """The arrays of a record, named as a shard's files."""
    lattice = parts["features"].lattice() if "features" in parts else None
    if lattice is None:
        return {name: part.array() for name, part in parts.items()}
    rest = {name: part.array() for name, part in parts.items() if name != "features"}
    return {"features": lattice.levels, "low": lattice.low, "step": lattice.step, **rest}


def _append(record: Mapping[str, Array], arrays: Room, done: int) -> int:
    """Write a record after the first `done` rows; returns the new number of rows."""
    if record.keys() != arrays.keys():
        raise AdmissionError(f"sample {done} came by another codec than those before")
    end = done + len(record["labels"])
    for name, array in record.items():
        arrays[name][done:end] = array
    return end


def _room(folder: Path, record: Mapping[str, Array], samples: int) -> Room:
    """A mapped file for each array of a record, with room for all rows."""
    rooms = {}
    for name, array in record.items():
        path, dtype = folder / f"{name}.npy", np.int64 if name == "labels" else array.dtype
        shape = (samples, *array.shape[1:])
        rooms[name] = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        # Without room a mapped write would end the process by SIGBUS; this raises instead.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return rooms
