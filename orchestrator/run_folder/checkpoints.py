"""Checkpoints: what a strategy has learnt after each round, on disk.

    checkpoints/0003/   state.safetensors and state.json after round 3,
                        journal.json: what a new journal starts from if the old one is damaged,
                        digests.json: the SHA-256 of these files
    checkpoints/0004.damaged-1/    set aside, because it could not be read
    checkpoints/0005.undone-1/     set aside by `orchestrator rollback`

A checkpoint is written whole under another name and then renamed. Kept are the newest `KEPT`, the
best one, and those that `keep_every` asks for.
"""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from orchestrator.strategies.strategy import Checkpoint
from wire import records, storage
from wire.errors import RunError

KEPT = 2
DIGESTS = "digests.json"


class Resumption(NamedTuple):
    """What a new journal starts from.

    Attributes:
        run: the run's id.
        sequence: of the round's orders; later rounds have higher ones.
        devices: what carries out the orders: agents, or a simulation's data.
        facts: values that must not change during the run, by name.
        rounds: the reports of all closed rounds.
    """

    run: str
    sequence: int
    devices: str
    facts: dict[str, str]
    rounds: list[dict[str, Any]]


def write(folder: Path, round_: int, state: Checkpoint, journal: str) -> None:
    """Write the checkpoint after a round; an older one of the round is replaced.

    Args:
        folder: of the run.
        round_: its number.
        state: after the round.
        journal: a `Resumption` in JSON.
    """
    final = folder / "checkpoints" / f"{round_:04d}"
    building = final.with_suffix(".new")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    # safetensors writes memory as it lies: a channels-last array would be saved scrambled.
    tensors = {name: np.asarray(array, order="C") for name, array in state.tensors.items()}
    files = {
        "state.safetensors": save(tensors),
        "state.json": json.dumps(records.plain(state.notes), indent=1).encode(),
        "journal.json": journal.encode(),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[DIGESTS] = json.dumps(digests, indent=1).encode()
    for name, content in files.items():
        storage.write(building / name, content)
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    storage.sync_folder(final.parent)


def drop_old(folder: Path, every: int, best: Collection[int]) -> None:
    """Remove all checkpoints but the newest `KEPT`, every `every`-th, and those in `best`.

    Args:
        folder: of the run.
        every: 0 keeps none for its number.
        best: further rounds to keep.
    """
    for number in numbers(folder)[:-KEPT]:
        if number not in best and not (every and number % every == 0):
            shutil.rmtree(folder / "checkpoints" / f"{number:04d}")


def read(folder: Path, round_: int) -> Checkpoint:
    """The state after a round.

    Raises:
        RunError: there is no such checkpoint, or its files are damaged.
        StorageError: they cannot be read.
    """
    path = folder / "checkpoints" / f"{round_:04d}"
    try:
        with storage.at(path):
            tensors = load(_content(path, "state.safetensors"))
            notes = json.loads(_content(path, "state.json"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
        raise RunError(f"checkpoint {path} is damaged: {fault}; restore it") from fault
    return Checkpoint({name: np.asarray(array) for name, array in sorted(tensors.items())}, notes)


def set_aside(folder: Path, round_: int, why: Literal["damaged", "undone"]) -> None:
    """Rename the checkpoint of a round, so that it is no longer one."""
    path, number = folder / "checkpoints" / f"{round_:04d}", 1
    while (aside := path.with_name(f"{path.name}.{why}-{number}")).exists():
        number += 1
    path.rename(aside)
    storage.sync_folder(path.parent)


def _content(path: Path, name: str) -> bytes:
    """A file of a checkpoint, checked; versions before 0.1 wrote no digests.

    Raises:
        OSError: it cannot be read; ValueError: it is damaged.
    """
    content = (path / name).read_bytes()
    if (path / DIGESTS).exists():
        expected = json.loads((path / DIGESTS).read_text())[name]
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise ValueError(f"{name} has SHA-256 {found:.12}..., expected {expected:.12}...")
    return content


def last(folder: Path) -> tuple[int, Checkpoint]:
    """The newest checkpoint of a run folder and its round, for commands that only read.

    Raises:
        RunError: there is none, or its files are damaged.
    """
    there = numbers(folder)
    if not there:
        raise RunError(f"{folder}: no round is finished yet; look with: orchestrator status")
    return there[-1], read(folder, there[-1])


def resumption(folder: Path) -> Resumption | None:
    """What a new journal of a run folder can start from; None without a readable checkpoint."""
    for number in reversed(numbers(folder)):
        try:
            read(folder, number)
            path = folder / "checkpoints" / f"{number:04d}"
            return Resumption(**json.loads(_content(path, "journal.json")))
        except (OSError, ValueError, KeyError, TypeError, RunError):
            continue  # written by an older version, or damaged too
    return None


def numbers(folder: Path) -> list[int]:
    """The rounds that have a checkpoint, ascending."""
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit())
