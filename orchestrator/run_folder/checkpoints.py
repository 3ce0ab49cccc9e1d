"""Checkpoints: what a strategy has learnt after each round, on disk.

    checkpoints/0003/   state.safetensors and state.json after round 3,
                        journal.json: what a new journal starts from if the old one is damaged

A checkpoint is written whole under another name and then renamed. The last `KEPT` are kept.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from orchestrator.strategies.strategy import Checkpoint
from wire import records, storage
from wire.errors import RunError

KEPT = 2


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
    storage.write(building / "state.safetensors", save(tensors))
    notes = json.dumps(records.plain(state.notes), indent=1)
    storage.write(building / "state.json", notes.encode())
    storage.write(building / "journal.json", journal.encode())
    shutil.rmtree(final, ignore_errors=True)
    building.rename(final)
    storage.sync_folder(final.parent)


def drop_old(folder: Path) -> None:
    """Remove all checkpoints but the last `KEPT`."""
    for number in _numbers(folder)[:-KEPT]:
        shutil.rmtree(folder / "checkpoints" / f"{number:04d}")


def read(folder: Path, round_: int) -> Checkpoint:
    """The state after a round.

    Raises:
        RunError: there is no such checkpoint, or its files are damaged.
    """
    path = folder / "checkpoints" / f"{round_:04d}"
    try:
        tensors = load_file(path / "state.safetensors")
        notes = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as fault:
        raise RunError(
            f"checkpoint {path} cannot be read: {fault}; restore it. To go back by a round, move "
            f"it and {folder / 'journal.db'} elsewhere, and start again"
        ) from fault
    return Checkpoint({name: np.asarray(array) for name, array in tensors.items()}, notes)


def last(folder: Path) -> tuple[int, Checkpoint]:
    """The newest checkpoint of a run folder and its round, for commands that only read.

    Raises:
        RunError: there is none, or its files are damaged.
    """
    numbers = _numbers(folder)
    if not numbers:
        raise RunError(f"{folder}: no round is finished yet; look with: orchestrator status")
    return numbers[-1], read(folder, numbers[-1])


def resumption(folder: Path) -> Resumption | None:
    """What a new journal of a run folder can start from; None without a readable checkpoint."""
    for number in reversed(_numbers(folder)):
        try:
            read(folder, number)
            content = json.loads((folder / f"checkpoints/{number:04d}/journal.json").read_text())
            return Resumption(**content)
        except (OSError, ValueError, TypeError, RunError):
            continue  # written by an older version, or damaged too
    return None


def _numbers(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit())
