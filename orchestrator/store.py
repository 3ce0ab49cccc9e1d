"""A run's folder: the journal, the checkpoints, the blobs.

    runs/NAME/
        run.json            the configuration it was started with
        journal.db          rounds, orders, results, bytes (SQLite, WAL, synchronous=FULL)
        artifact/           the training artifact
        checkpoints/0003/   state.safetensors and state.json after round 3
        blobs/, shards/     payloads by digest; decoded feature maps
        status.json, report.json

An accepted result is in the journal before the device is told so. A checkpoint is written whole
under another name and renamed, then the journal says that its round is closed: whatever the moment
of a `kill -9`, a restart finds the last closed round, and of the open one the accepted results.
"""

import copy
import fcntl
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from orchestrator.config import RunConfig
from orchestrator.strategies.strategy import State
from wire import messages, records
from wire.blobs import BlobStore, sync_folder
from wire.errors import RunError
from wire.messages import Order, Result
from wire.names import written

_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (run TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (what TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS attempts (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL,
    closed INTEGER NOT NULL DEFAULT 0, report TEXT);
CREATE TABLE IF NOT EXISTS orders (
    sequence INTEGER NOT NULL, device TEXT NOT NULL, work_order BLOB NOT NULL,
    PRIMARY KEY (sequence, device));
CREATE TABLE IF NOT EXISTS verdicts (
    sequence INTEGER NOT NULL, device TEXT NOT NULL, accepted INTEGER NOT NULL,
    reason TEXT NOT NULL, result BLOB NOT NULL, PRIMARY KEY (sequence, device));
CREATE TABLE IF NOT EXISTS traffic (
    device TEXT PRIMARY KEY, up INTEGER NOT NULL, down INTEGER NOT NULL);
"""
_COUNT = """
INSERT INTO traffic VALUES (?, ?, ?)
ON CONFLICT DO UPDATE SET up = up + excluded.up, down = down + excluded.down
"""


@dataclass(frozen=True)
class Verdict:
    """What became of one device's result."""

    device: str
    accepted: bool
    reason: str
    result: Result


@dataclass(frozen=True)
class Attempt:
    """A round that was opened: its orders, those carried over included, and verdicts so far."""

    sequence: int
    round: int
    orders: Mapping[str, Order]
    verdicts: Mapping[str, Verdict]
    closed: bool = False

    def carried(self, rounds: int) -> dict[str, Order]:
        """Orders that are open still once the round is closed: not answered, nor too old."""
        unanswered = {n: o for n, o in self.orders.items() if n not in self.verdicts}
        return {n: o for n, o in unanswered.items() if self.round - o.round < rounds}


def referred(orders: Iterable[Order]) -> set[str]:
    """Digests of the blobs that devices may still ask for, to do these orders."""
    refs = (ref for order in orders for ref in (order.state, order.teacher))
    return {ref.digest for ref in refs if ref}


class Store:
    """One run's folder, locked against a second orchestrator.

    Args:
        config: of the run.
        devices: what does its orders: agents, or devices simulated with certain data.

    Raises:
        RunError: the folder belongs to another configuration or to other devices, or is in use.
    """

    def __init__(self, config: RunConfig, devices: str = "agents") -> None:
        self.folder = config.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            self._lock.close()
            raise RunError(f"{self.folder}: another orchestrator is running this run") from fault
        self._claim(config)
        self.blobs = BlobStore(self.folder / "blobs", config.chunk_bytes)
        self._db = sqlite3.connect(self.folder / "journal.db")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)
        # Bytes are counted with every message: what a power cut takes of them is not worth a sync.
        self._counts = sqlite3.connect(self.folder / "journal.db", isolation_level=None)
        self._counts.execute("PRAGMA synchronous=NORMAL")
        self._kept: frozenset[str] = frozenset()
        self._claim_devices(devices)
        self.run_id = self._identify(config.name)

    def keep(self, digests: frozenset[str]) -> None:
        """Never drop these blobs either: the artifact's, packages."""
        self._kept |= digests

    def _identify(self, name: str) -> str:
        """The run's name for devices: another run of the same name must not be taken for it."""
        with self._db:
            row = self._db.execute("SELECT run FROM identity").fetchone()
            if row is None:
                row = (f"{name}.{secrets.token_hex(4)}",)
                self._db.execute("INSERT INTO identity VALUES (?)", row)
        return str(row[0])

    def closed_rounds(self) -> list[dict[str, Any]]:
        """The reports of all closed rounds, in order."""
        rows = self._db.execute("SELECT report FROM attempts WHERE closed = 1 ORDER BY round")
        return [json.loads(report) for (report,) in rows]

    def last_attempt(self, *, closed: bool = False) -> Attempt | None:
        """The round that was last opened, or the last of those that are closed."""
        row = self._db.execute(
            "SELECT sequence, round, closed FROM attempts WHERE closed >= ? "
            "ORDER BY sequence DESC LIMIT 1",
            (closed,),
        ).fetchone()
        if row is None:
            return None
        orders = {}
        for device, data in self._db.execute(
            "SELECT device, work_order FROM orders WHERE sequence = ?", (row[0],)
        ):
            order, _ = messages.decode(data, sender="journal")
            assert isinstance(order, Order)  # noqa: S101 - only begin() writes this column
            orders[device] = order
        return Attempt(row[0], row[1], orders, self._verdicts(row[0]), bool(row[2]))

    def next_sequence(self) -> int:
        """The sequence number that `begin` will give next."""
        (last,) = self._db.execute("SELECT COALESCE(MAX(sequence), 0) FROM attempts").fetchone()
        return int(last) + 1

    def begin(self, round_: int, orders: Mapping[str, Order]) -> Attempt:
        """Note a round's orders before they are sent; bytes are counted from here."""
        with self._db:
            self._db.execute("DELETE FROM traffic")
            cursor = self._db.execute("INSERT INTO attempts (round) VALUES (?)", (round_,))
            sequence = int(cursor.lastrowid or 0)
            self._db.executemany(
                "INSERT INTO orders VALUES (?, ?, ?)",
                [(sequence, device, messages.encode(order)) for device, order in orders.items()],
            )
        return Attempt(sequence, round_, dict(orders), {})

    def count(self, device: str, *, up: int = 0, down: int = 0) -> None:
        """Note bytes that came from a device or went to it."""
        self._counts.execute(_COUNT, (device, up, down))

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Bytes up and down of each device since the last round began, whoever counted them."""
        rows = self._db.execute("SELECT device, up, down FROM traffic")
        return {device: (up, down) for device, up, down in rows}

    def decide(self, sequence: int, verdict: Verdict) -> None:
        """Note what became of a result, before the device is told. The first word stands.

        A result of an order that was carried over is noted under its own sequence as well, by which
        the device offers it.
        """
        rest = (
            verdict.device, verdict.accepted, verdict.reason, messages.encode(verdict.result)
        )  # fmt: skip
        with self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?)",
                [(number, *rest) for number in sorted({sequence, verdict.result.sequence})],
            )

    def verdict(self, sequence: int, device: str) -> Verdict | None:
        """What became of a device's result, if it is decided."""
        return self._verdicts(sequence).get(device)

    def close_round(
        self,
        attempt: Attempt,
        state: State,
        report: Mapping[str, Any],
        needed: Collection[str] = (),
    ) -> None:
        """Write the checkpoint, note the round as closed, then drop what neither refers to.

        Args:
            attempt: the round.
            state: after it.
            report: its entry.
            needed: digests of further blobs to keep, which carried orders refer to.
        """
        final = self.folder / "checkpoints" / f"{attempt.round:04d}"
        building = final.with_suffix(".new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        # safetensors writes memory as it lies: a channels-last view would be saved scrambled.
        tensors = {name: np.asarray(array, order="C") for name, array in state.tensors.items()}
        _write(building / "state.safetensors", save(tensors))
        _write(building / "state.json", json.dumps(records.plain(state.notes), indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        sync_folder(final.parent)
        with self._db:
            self._db.execute(
                "UPDATE attempts SET closed = 1, report = ? WHERE sequence = ?",
                (json.dumps(report), attempt.sequence),
            )
        for old in sorted(final.parent.iterdir(), key=lambda path: int(path.name))[:-2]:
            shutil.rmtree(old)
        self.blobs.keep_only(state.blobs() | self._kept | set(needed))

    def checkpoint(self) -> State | None:
        """The state after the last closed round.

        Raises:
            RunError: its files are damaged.
        """
        (last,) = self._db.execute("SELECT MAX(round) FROM attempts WHERE closed = 1").fetchone()
        return read_checkpoint(self.folder, int(last)) if last else None

    def write_json(self, name: str, content: object) -> None:
        """Replace a JSON file of the run folder, whole or not at all."""
        partial = self.folder / f"{name}.new"
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self.folder / name)

    def close(self) -> None:
        """Let go of the run."""
        self._counts.close()
        self._db.close()
        self._lock.close()

    def _claim(self, config: RunConfig) -> None:
        """A run goes on only with what decides its numbers unchanged.

        What it began with as `pretrained` lies in its folder; where that came from may be gone.
        More rounds are welcome, unless they decide the learning rate.
        """
        path = self.folder / "run.json"
        current = json.loads(json.dumps(records.plain(config)))
        current["broker"]["password"] = ""  # the run's folder is for others to read
        if path.exists():
            table = json.loads(path.read_text())
            table.pop("broker", None)  # decides no numbers, and rules for it have become stricter
            before = records.plain(records.build(RunConfig, table, where=str(path), error=RunError))
            before = json.loads(json.dumps(before))
            keys = ["fleet", "strategy", "seed", "device", "submodel", "transfer", "server"]
            for table in (before, kept := copy.deepcopy(current)):
                for key in ("eval_batch", "torch_device", "compile"):
                    del table["server"][key]
                device = table["device"]
                for owner in (table["server"], device, *device["others"]):
                    owner["model"] = written(owner["model"])  # the run's folder may have moved
            if bool(before["pretrained"]) != bool(kept["pretrained"]):
                keys.append("pretrained")
            if "cosine" in (config.device.schedule, config.server.schedule):
                keys.append("rounds")
            for key in keys:
                if before[key] != kept[key]:
                    self._lock.close()
                    raise RunError(
                        f"{self.folder} was started with {key} = {before[key]}, the configuration "
                        f"says {kept[key]}; choose another name, or restore it"
                    )
        self.write_json("run.json", current)

    def _claim_devices(self, devices: str) -> None:
        """A run goes on only with the devices it was begun with: agents, or a simulation's data."""
        with self._db:
            row = self._db.execute("SELECT what FROM devices").fetchone()
            if row is None:
                self._db.execute("INSERT INTO devices VALUES (?)", (devices,))
        if row is not None and row[0] != devices:
            self.close()
            raise RunError(
                f"{self.folder} was begun with {row[0]}, now it is {devices}; choose another name"
            )

    def _verdicts(self, sequence: int) -> dict[str, Verdict]:
        found = {}
        for device, accepted, reason, data in self._db.execute(
            "SELECT device, accepted, reason, result FROM verdicts WHERE sequence = ?", (sequence,)
        ):
            result, _ = messages.decode(data, sender="journal")
            assert isinstance(result, Result)  # noqa: S101 - only decide() writes this column
            found[device] = Verdict(device, bool(accepted), reason, result)
        return found


def read_checkpoint(folder: Path, round_: int) -> State:
    """The state after a round.

    Raises:
        RunError: there is no such checkpoint, or its files are damaged.
    """
    path = folder / "checkpoints" / f"{round_:04d}"
    try:
        tensors = load_file(path / "state.safetensors")
        notes = json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as fault:
        raise RunError(f"checkpoint {path} cannot be read: {fault}") from fault
    return State({name: np.asarray(array) for name, array in tensors.items()}, notes)


def last_checkpoint(folder: Path) -> tuple[int, State]:
    """The newest checkpoint of a run folder, for commands that only read.

    Raises:
        RunError: there is none.
    """
    numbers = [int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()]
    if not numbers:
        raise RunError(f"{folder}: no round is finished yet; look with: orchestrator status")
    return max(numbers), read_checkpoint(folder, max(numbers))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
