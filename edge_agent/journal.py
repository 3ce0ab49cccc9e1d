"""The device's journal: the open order, its result, and which files hold the device's weights.

It is SQLite in WAL mode with synchronous=FULL: a committed row survives `kill -9` and a power cut.
One order is open at a time; a newer one replaces it.

MQTT may acknowledge an order or a receipt before it is written here. If power fails in between, the
message comes again: the orchestrator repeats an open order when the device is born, and answers a
repeated result with the same receipt.

A damaged journal is renamed to `journal.db.damaged-1`, and a new one is begun. Nothing is lost: the
orchestrator sends an open order again, and the weights are found by the names of their files.
"""

import hashlib
import logging
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from wire import messages, storage
from wire.errors import DamagedError, OrderError, StillhouseError, WireError
from wire.messages import Order, Result

T = TypeVar("T")
log = logging.getLogger("edge-agent")

SESSIONS = 1 << 24  # for each start of the agent; a message's number has room for 500 million

_WEIGHTS = re.compile(r"weights-(.+)-(\d+)\.safetensors")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS work (
    run TEXT NOT NULL, sequence INTEGER NOT NULL, work_order BLOB NOT NULL, result BLOB,
    receipted INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (run, sequence));
CREATE TABLE IF NOT EXISTS weights (
    run TEXT NOT NULL, artifact TEXT NOT NULL, file TEXT NOT NULL, PRIMARY KEY (run, artifact));
"""


class Journal:
    """The journal of one device; any thread may use it.

    Each function raises StalledError if the disk is full or another program holds the journal, and
    StorageError if the journal cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._db = _opened(path)
        except DamagedError as fault:
            self._db = _begun_anew(path, fault)

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in a transaction; if the journal proves damaged, repeat it in a new one."""
        with self._lock:
            try:
                with storage.at(self._path), self._db:
                    return work(self._db)
            except DamagedError as fault:
                self._db.close()
                self._db = _begun_anew(self._path, fault)
                with storage.at(self._path), self._db:
                    return work(self._db)

    def begin_sessions(self, machine: str = "") -> tuple[str, int]:
        """The id of this state folder, and the first of `SESSIONS` session numbers for the caller.

        No number is ever given out twice. All numbers of an agent's connections come from one
        write, so that no connection waits for the disk. On another machine the folder gets a new
        id: it may be a copy of a card that is still in use.

        Args:
            machine: a name that no other machine has; "" if there is none.
        """
        number = int(hashlib.sha256(machine.encode()).hexdigest()[:15], 16)

        def begin(db: sqlite3.Connection) -> dict[str, int]:
            counters: dict[str, int] = dict(db.execute("SELECT name, value FROM counters"))
            counters["session"] = counters.get("session", 0) + SESSIONS
            if machine:
                if counters.get("machine", number) != number:
                    counters.pop("state", None)
                counters["machine"] = number
            counters.setdefault("state", secrets.randbits(63))
            db.executemany("INSERT OR REPLACE INTO counters VALUES (?, ?)", counters.items())
            return counters

        counters = self._do(begin)
        return f"{counters['state']:016x}", counters["session"] - SESSIONS + 1

    def sealed(self, signer: str, at: int | None = None) -> int:
        """When the newest order that was taken was sealed (`wire.sealing`); notes a later one.

        Args:
            signer: the orchestrator's key; by another key there was none yet.
            at: the later one.
        """
        name = f"sealed {signer}"

        def write(db: sqlite3.Connection) -> int:
            if at is not None:
                db.execute("INSERT OR REPLACE INTO counters VALUES (?, ?)", (name, at))
            row = db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
            return int(row[0]) if row else 0

        return self._do(write)

    def latest(self) -> tuple[Order, Result | None, bool] | None:
        """The newest order, its result if it has one, and whether the result has a receipt.

        A newer agent, since rolled back, may have accepted an order that this agent cannot read.
        Such an order is ignored here, and refused when it comes again.
        """
        return self._do(_latest)

    def accept(self, order: Order) -> None:
        """Make `order` the open one, and drop older ones."""

        def write(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM work")
            _note(db, order)

        self._do(write)

    def finish(self, order: Order, result: Result, weights_file: str | None) -> None:
        """Write the order's result and the name of the new weights file, both or neither."""

        def write(db: sqlite3.Connection) -> None:
            _note(db, order)  # a new journal, in place of a damaged one, does not have it
            db.execute(
                "UPDATE work SET result = ? WHERE run = ? AND sequence = ?",
                (messages.encode(result), order.run, order.sequence),
            )
            if weights_file:
                db.execute("DELETE FROM weights WHERE run = ?", (order.run,))
                db.execute(
                    "INSERT INTO weights VALUES (?, ?, ?)",
                    (order.run, order.artifact.digest, weights_file),
                )

        self._do(write)

    def receipted(self, run: str, sequence: int) -> None:
        """Note that this result has its receipt, so that it is not offered again."""
        self._do(
            lambda db: db.execute(
                "UPDATE work SET receipted = 1 WHERE run = ? AND sequence = ?", (run, sequence)
            )
        )

    def weights_files(self) -> dict[str, str]:
        """The name of the file with the device's own weights, for each run that has one."""
        return self._do(lambda db: dict(db.execute("SELECT run, file FROM weights")))

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._db.close()


def newest_weights(path: Path) -> tuple[str, str, str] | None:
    """Run, artifact and file of the weights that the device trained last; None without any.

    It only reads, so it may be called while an agent runs.

    Raises:
        StillhouseError: the journal cannot be read.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            row: tuple[str, str, str] | None = db.execute(
                "SELECT run, artifact, file FROM weights WHERE artifact != '' "
                "ORDER BY rowid DESC LIMIT 1"
            ).fetchone()
    except sqlite3.Error as fault:
        raise StillhouseError(f"{path}: the journal cannot be read ({fault})") from fault
    return row


def _latest(db: sqlite3.Connection) -> tuple[Order, Result | None, bool] | None:
    row = db.execute(
        "SELECT work_order, result, receipted FROM work ORDER BY rowid DESC LIMIT 1"
    ).fetchone()
    if row is None:
        return None
    try:
        order, _ = messages.decode(row[0], sender="journal")
        result = messages.decode(row[1], sender="journal")[0] if row[1] else None
    except OrderError as fault:
        log.warning("%s", fault)
        return None
    except WireError as fault:
        raise DamagedError(f"journal.db: {fault}") from fault
    assert isinstance(order, Order)  # noqa: S101 - only accept() writes this column
    assert result is None or isinstance(result, Result)  # noqa: S101 - only finish() writes it
    return order, result, bool(row[2])


def _note(db: sqlite3.Connection, order: Order) -> None:
    db.execute(
        "INSERT OR IGNORE INTO work (run, sequence, work_order) VALUES (?, ?, ?)",
        (order.run, order.sequence, messages.encode(order)),
    )


def _opened(path: Path) -> sqlite3.Connection:
    """The journal in a file, checked and ready to be written.

    Raises:
        DamagedError: the journal is damaged.
        StorageError: it cannot be opened or written.
    """
    with storage.at(path):
        # `Journal` uses it under a lock, so any thread may.
        db = sqlite3.connect(path, check_same_thread=False)
        try:
            storage.prepare(db)
            fresh = not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'work'").fetchone()
            with db:
                db.executescript(_SCHEMA)
            if fresh:
                _find_weights(db, path.parent)
        except BaseException:
            db.close()
            raise
    return db


def _begun_anew(path: Path, fault: DamagedError) -> sqlite3.Connection:
    with storage.at(path):
        aside = storage.set_aside(path)
    log.error(
        "%s; set aside as %s, and a new one is begun. Nothing is lost but time: the orchestrator "
        "sends an open order again, and the weights are found by the names of their files",
        fault, aside.name,
    )  # fmt: skip
    return _opened(path)


def _find_weights(db: sqlite3.Connection, folder: Path) -> None:
    """Note the newest weights file of each run in the folder; a new journal knows none yet."""
    found = filter(None, (_WEIGHTS.fullmatch(path.name) for path in folder.glob("weights-*")))
    newest = {match[1]: match[0] for match in sorted(found, key=lambda match: int(match[2]))}
    with closing(db.cursor()) as cursor, db:
        cursor.executemany("INSERT INTO weights VALUES (?, '', ?)", newest.items())
    if newest:
        log.warning("the journal was gone; weights were found for %s", ", ".join(sorted(newest)))
