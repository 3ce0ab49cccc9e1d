"""What must survive a power cut: the open order, its result, and where the device's weights lie.

SQLite in WAL mode with synchronous=FULL: a row that was committed is there after `kill -9` and
after a power cut. One order is open at a time; a newer one replaces it.
"""

import logging
import secrets
import sqlite3
from contextlib import closing
from pathlib import Path

from wire import messages
from wire.errors import OrderError, StillhouseError
from wire.messages import Order, Result

log = logging.getLogger("edge-agent")

SESSIONS = 1 << 24  # of one start; 500 million starts fit into a message's number

_SCHEMA = """
CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS work (
    run TEXT NOT NULL, sequence INTEGER NOT NULL, work_order BLOB NOT NULL, result BLOB,
    receipted INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (run, sequence));
CREATE TABLE IF NOT EXISTS weights (
    run TEXT NOT NULL, artifact TEXT NOT NULL, file TEXT NOT NULL, PRIMARY KEY (run, artifact));
"""


class Journal:
    """The journal of one device. Use it from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = _connect(path)
        self._db.executescript(_SCHEMA)

    def begin_sessions(self) -> tuple[str, int]:
        """The id of this state folder, and a number: the `SESSIONS` from it on are the caller's.

        No number is ever given out twice. One write gives an agent's connections all of theirs, so
        that none waits for the disk.
        """
        with self._db:
            for name, value in (("session", 0), ("state", secrets.randbits(63))):
                self._db.execute("INSERT OR IGNORE INTO counters VALUES (?, ?)", (name, value))
            self._db.execute(
                "UPDATE counters SET value = value + ? WHERE name = 'session'", (SESSIONS,)
            )
        found = dict(self._db.execute("SELECT name, value FROM counters"))
        return f"{found['state']:016x}", int(found["session"]) - SESSIONS + 1

    def latest(self) -> tuple[Order, Result | None, bool] | None:
        """The newest order, its result if it has one, and whether the result is receipted.

        An order that a newer agent accepted, before it was rolled back, may be beyond this one: it
        is passed over, and refused when it comes again.
        """
        row = self._db.execute(
            "SELECT work_order, result, receipted FROM work ORDER BY rowid DESC LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        try:
            order, _ = messages.decode(row[0], sender="journal")
        except OrderError as fault:
            log.warning("%s", fault)
            return None
        result = messages.decode(row[1], sender="journal")[0] if row[1] else None
        assert isinstance(order, Order)  # noqa: S101 - only accept() writes this column
        assert result is None or isinstance(result, Result)  # noqa: S101 - only finish() writes it
        return order, result, bool(row[2])

    def accept(self, order: Order) -> None:
        """Make `order` the open one; older ones are dropped."""
        with self._db:
            self._db.execute("DELETE FROM work")
            self._db.execute(
                "INSERT INTO work (run, sequence, work_order) VALUES (?, ?, ?)",
                (order.run, order.sequence, messages.encode(order)),
            )

    def finish(self, order: Order, result: Result, weights_file: str | None) -> None:
        """The order's result, and with it the device's new weights: both or neither."""
        with self._db:
            self._db.execute(
                "UPDATE work SET result = ? WHERE run = ? AND sequence = ?",
                (messages.encode(result), order.run, order.sequence),
            )
            if weights_file:
                self._db.execute("DELETE FROM weights WHERE run = ?", (order.run,))
                self._db.execute(
                    "INSERT INTO weights VALUES (?, ?, ?)",
                    (order.run, order.artifact.digest, weights_file),
                )

    def receipted(self, run: str, sequence: int) -> None:
        """The orchestrator has spoken on this result; it need not be offered again."""
        with self._db:
            self._db.execute(
                "UPDATE work SET receipted = 1 WHERE run = ? AND sequence = ?", (run, sequence)
            )

    def weights_file(self, run: str) -> str | None:
        """The name of the file with the device's own weights for a run, if it has trained any."""
        row = self._db.execute("SELECT file FROM weights WHERE run = ?", (run,)).fetchone()
        return row[0] if row else None

    def weights_files(self) -> set[str]:
        """Every weights file that is still referred to."""
        return {file for (file,) in self._db.execute("SELECT file FROM weights")}

    def close(self) -> None:
        """Close the database."""
        self._db.close()


def newest_weights(path: Path) -> tuple[str, str, str] | None:
    """Run, artifact and file of the weights that the device trained last, if there are any.

    It only reads, so that it may be asked beside a running agent.

    Raises:
        StillhouseError: the journal cannot be read.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            row: tuple[str, str, str] | None = db.execute(
                "SELECT run, artifact, file FROM weights ORDER BY rowid DESC LIMIT 1"
            ).fetchone()
    except sqlite3.Error as fault:
        raise StillhouseError(f"{path}: the journal cannot be read ({fault})") from fault
    return row


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    return db
