"""A run's journal: rounds, orders, results, bytes. SQLite, WAL, synchronous=FULL.

An accepted result is written before the device is told. A journal that is found damaged at a start
is set aside as `journal.db.damaged-1`, and a new one continues from the last checkpoint.
"""

import contextlib
import json
import logging
import secrets
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from orchestrator.rules.attempt import Attempt, Verdict
from orchestrator.run_folder import checkpoints
from orchestrator.run_folder.checkpoints import Resumption
from wire import messages, storage
from wire.errors import DamagedError, RunError, StalledError, WireError
from wire.messages import Message, Order, Result

T = TypeVar("T")
M = TypeVar("M", bound=Message)
log = logging.getLogger("orchestrator")

LEAP = 1 << 20  # skips the sequence numbers that a damaged journal may have given out
_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (run TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (what TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
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
_VERDICTS = "SELECT device, accepted, reason, result FROM verdicts WHERE sequence = ?"
_COUNT = """
INSERT INTO traffic VALUES (?, ?, ?)
ON CONFLICT DO UPDATE SET up = up + excluded.up, down = down + excluded.down
"""


class Journal:
    """The journal in a run's folder. Use it from one thread.

    Each function raises StalledError if the disk is full or another program holds the file,
    DamagedError if it is damaged, and StorageError if it cannot be read or written.

    Args:
        folder: of the run.
        begun: whether the run has begun, so that a journal must exist.

    Raises:
        RunError: it is damaged, and there is no checkpoint to continue from.
    """

    def __init__(self, folder: Path, *, begun: bool) -> None:
        self._folder, self._path = folder, folder / "journal.db"
        self._uncounted: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        self._opened = contextlib.ExitStack()
        try:
            self._open()
            self._read_all(begun=begun)
        except DamagedError as fault:
            self._begin_anew(fault)
        except BaseException:
            self.close()
            raise

    def identify(self, name: str) -> str:
        """The run's id: `name` and a random part, so that devices tell it from its namesakes."""
        drawn = f"{name}.{secrets.token_hex(4)}"
        return self._first("SELECT run FROM identity", "INSERT INTO identity VALUES (?)", drawn)

    def _claim_devices(self, devices: str) -> None:
        """Note a new run's devices (agents, or a simulation's data); refuse others when it resumes.

        Raises:
            RunError: the run was begun with other devices.
        """
        read, write = "SELECT what FROM devices", "INSERT INTO devices VALUES (?)"
        if (before := self._first(read, write, devices)) != devices:
            raise RunError(
                f"{self._folder} was begun with {before}, now it is {devices}; choose another name"
            )

    def hold(self, fact: str, value: str) -> bool:
        """Note a fact's value at the first call; returns whether `value` is the noted one."""

        def look(db: sqlite3.Connection) -> bool:
            db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (fact, value))
            row = db.execute("SELECT value FROM facts WHERE name = ?", (fact,)).fetchone()
            return bool(row[0] == value)

        return self._do(look)

    def closed_rounds(self) -> list[dict[str, Any]]:
        """The reports of all closed rounds, in order."""
        read = "SELECT report FROM attempts WHERE closed = 1 ORDER BY round"
        return self._do(lambda db: [json.loads(report) for (report,) in db.execute(read)])

    def last_attempt(self, *, closed: bool = False) -> Attempt | None:
        """The last round that was opened or, with `closed`, the last that was closed."""

        def read(db: sqlite3.Connection) -> Attempt | None:
            row = db.execute(
                "SELECT sequence, round, closed FROM attempts WHERE closed >= ? "
                "ORDER BY sequence DESC LIMIT 1",
                (closed,),
            ).fetchone()
            if row is None:
                return None
            sequence, round_, done = row
            rows = db.execute(
                "SELECT device, work_order FROM orders WHERE sequence = ?", (sequence,)
            )
            orders = {device: _message(data, Order) for device, data in rows}
            return Attempt(sequence, round_, orders, _verdicts(db, sequence), bool(done))

        return self._do(read)

    def retries(self) -> int:
        """How many attempts at the open round ended before the last one."""
        closed = "SELECT COALESCE(MAX(sequence), 0) FROM attempts WHERE closed = 1"
        since = f"sequence > ({closed}) AND closed >= 0"
        read = f"SELECT COUNT(*) FROM attempts WHERE {since}"  # noqa: S608 - ours
        return max(self._number(read) - 1, 0)

    def next_sequence(self) -> int:
        """The sequence number that `begin` will use next."""
        return 1 + self._number("SELECT COALESCE(MAX(sequence), 0) FROM attempts")

    def begin(self, round_: int, orders: Mapping[str, Order]) -> Attempt:
        """Note a round's orders before they are sent, and start counting bytes from 0."""

        def write(db: sqlite3.Connection) -> Attempt:
            db.execute("DELETE FROM traffic")
            cursor = db.execute("INSERT INTO attempts (round) VALUES (?)", (round_,))
            sequence = int(cursor.lastrowid or 0)
            db.executemany(
                "INSERT INTO orders VALUES (?, ?, ?)",
                [(sequence, device, messages.encode(order)) for device, order in orders.items()],
            )
            return Attempt(sequence, round_, dict(orders), {})

        attempt = self._do(write)
        self._uncounted.clear()
        return attempt

    def count(self, device: str, *, up: int = 0, down: int = 0) -> None:
        """Count bytes from or to a device; if the disk is full, they are noted at a later call."""
        before = self._uncounted[device]
        self._uncounted[device] = (before[0] + up, before[1] + down)
        try:
            with storage.at(self._path):
                for name, (more_up, more_down) in list(self._uncounted.items()):
                    self._counts.execute(_COUNT, (name, more_up, more_down))
                    del self._uncounted[name]
        except StalledError:
            return

    def traffic(self) -> dict[str, tuple[int, int]]:
        """Each device's (bytes up, bytes down) since the last round began, restarts included."""
        read = "SELECT device, up, down FROM traffic"
        rows = self._do(lambda db: db.execute(read).fetchall())
        return {device: (up, down) for device, up, down in rows}

    def decide(self, sequence: int, verdict: Verdict) -> None:
        """Note the verdict on a result, before the device is told. The first verdict stands.

        A result of a carried order is also noted under the order's own sequence, which the device
        uses when it offers the result.
        """
        rest = (
            verdict.device, verdict.accepted, verdict.reason, messages.encode(verdict.result)
        )  # fmt: skip
        self._do(
            lambda db: db.executemany(
                "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?)",
                [(number, *rest) for number in sorted({sequence, verdict.result.sequence})],
            )
        )

    def verdict(self, sequence: int, device: str) -> Verdict | None:
        """The verdict on a device's result; None if there is none yet."""
        return self._do(lambda db: _verdicts(db, sequence, device)).get(device)

    def close(self) -> None:
        """Close the database."""
        self._opened.close()

    def _go_back(self, round_: int) -> None:
        """Undo all that came after a closed round; 0 undoes all. The next round is opened anew.

        Undone attempts stay with `closed` = -1: devices may still offer results of theirs, and
        their sequence numbers are not given out again.
        """
        closed = "SELECT COALESCE(MAX(sequence), 0) FROM attempts WHERE closed = 1 AND round = ?"
        undo = f"UPDATE attempts SET closed = -1 WHERE sequence > ({closed})"  # noqa: S608 - ours
        self._do(lambda db: db.execute(undo, (round_,)))

    def _close_attempt(self, sequence: int, report: Mapping[str, Any]) -> None:
        self._do(
            lambda db: db.execute(
                "UPDATE attempts SET closed = 1, report = ? WHERE sequence = ?",
                (json.dumps(report), sequence),
            )
        )

    def _resumption(self, attempt: Attempt, report: Mapping[str, Any]) -> str:
        """What a new journal starts from once this round is closed: a `Resumption` in JSON.

        The reports are copied as text: to read and write thousands of them takes seconds.
        """

        def read(db: sqlite3.Connection) -> tuple[Resumption, list[str]]:
            (run,) = db.execute("SELECT run FROM identity").fetchone()
            (devices,) = db.execute("SELECT what FROM devices").fetchone()
            facts = dict(db.execute("SELECT name, value FROM facts").fetchall())
            closed = "SELECT report FROM attempts WHERE closed = 1 AND round != ? ORDER BY round"
            rounds = [text for (text,) in db.execute(closed, (attempt.round,))]
            return Resumption(run, attempt.sequence, devices, facts, []), rounds

        known, rounds = self._do(read)
        rounds.append(json.dumps(report))
        return json.dumps(known._asdict()).removesuffix("]}") + ",\n".join(rounds) + "]}"

    def _first(self, read: str, write: str, value: str) -> str:
        """What `read` finds; if it finds nothing, `value`, which is then written."""

        def look(db: sqlite3.Connection) -> str:
            if row := db.execute(read).fetchone():
                return str(row[0])
            db.execute(write, (value,))
            return value

        return self._do(look)

    def _number(self, read: str) -> int:
        """The one number that a query returns."""
        return int(self._do(lambda db: db.execute(read).fetchone())[0])

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in one transaction; returns what it returns."""
        try:
            with storage.at(self._path), self._db:
                return work(self._db)
        except (WireError, json.JSONDecodeError) as fault:
            raise DamagedError(f"{self._path} is damaged ({fault})") from fault

    def _open(self) -> None:
        with storage.at(self._path):
            self._db = self._connected()
            # Bytes are counted with every message: losing a few to a power cut is cheaper than
            # a sync each time.
            self._counts = self._connected(isolation_level=None)
            storage.prepare(self._db)
            self._db.executescript(_SCHEMA)
            self._counts.execute("PRAGMA synchronous=NORMAL")

    def _connected(self, **settings: Any) -> sqlite3.Connection:
        """A connection that `close` closes."""
        db: sqlite3.Connection = sqlite3.connect(self._path, **settings)
        return self._opened.enter_context(contextlib.closing(db))

    def _read_all(self, *, begun: bool) -> None:
        """Read everything that a start reads.

        Raises:
            DamagedError: something cannot be read, or the run has begun and the journal is empty.
        """
        known = self._do(lambda db: db.execute("SELECT run FROM identity").fetchone())
        if begun and known is None:
            raise DamagedError(
                f"{self._path} is damaged (it is empty or gone, though the run has begun)"
            )
        self.closed_rounds()
        self.last_attempt()

    def _begin_anew(self, fault: DamagedError) -> None:
        """Set the journal aside, and start a new one from the last checkpoint.

        Raises:
            RunError: there is no readable checkpoint.
        """
        self.close()
        known = checkpoints.resumption(self._folder)
        if known is None:
            raise RunError(
                f"{fault}, and there is no checkpoint to go on after: what devices sent is lost. "
                f"Restore the file, or begin anew: remove {self._folder}, or choose another name"
            ) from fault
        with storage.at(self._path):
            aside = storage.set_aside(self._path)
        self._open()
        first = known.sequence + LEAP

        def write(db: sqlite3.Connection) -> None:
            db.execute("INSERT INTO identity VALUES (?)", (known.run,))
            db.execute("INSERT INTO devices VALUES (?)", (known.devices,))
            db.executemany("INSERT INTO facts VALUES (?, ?)", known.facts.items())
            db.executemany(
                "INSERT INTO attempts VALUES (?, ?, 1, ?)",
                [(first + i, e["round"], json.dumps(e)) for i, e in enumerate(known.rounds)],
            )

        self._do(write)
        last = known.rounds[-1]["round"]
        log.error(
            "%s; set aside as %s. The run goes on after its last checkpoint, that of round %d. "
            "Lost is what devices had sent in round %d, accepted results included: they are asked "
            "again",
            fault, aside.name, last, last + 1,
        )  # fmt: skip


def _verdicts(
    db: sqlite3.Connection, sequence: int, device: str | None = None
) -> dict[str, Verdict]:
    """The verdicts of one device, or of all, under a sequence number, by device."""
    found = (
        db.execute(_VERDICTS, (sequence,))
        if device is None
        else db.execute(_VERDICTS + " AND device = ?", (sequence, device))
    )
    return {
        name: Verdict(name, bool(accepted), reason, _message(data, Result))
        for name, accepted, reason, data in found
    }


def _message(data: bytes, kind: type[M]) -> M:
    """A message that `begin` or `decide` wrote."""
    message, _ = messages.decode(data, sender="journal")
    assert isinstance(message, kind)  # noqa: S101 - no other kind is written to the column
    return message
