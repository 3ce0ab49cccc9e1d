"""Writing to a disk, and its faults told apart: full, in use, damaged, not writable.

`sqlite3.Error` is not an OSError, and an OSError from `write` names no file. `at` turns both into
one kind of error that names the place and the remedy. `Patience` waits for a full disk.
"""

import errno
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from wire import locks
from wire.errors import DamagedError, StalledError, StorageError

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_S = 5.0
LITTLE = 64 * 1024  # bytes: less than this is a full disk; SQLite may report it as an I/O error
SET_ASIDE = 3  # damaged journals to keep, so that a card that fails again and again fills no disk
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DISK = {*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO, errno.ENODEV,
         errno.ESTALE}  # fmt: skip
_CODES = 0xFF  # SQLite's extended codes keep the kind in their lowest byte


@contextmanager
def at(path: Path) -> Iterator[None]:
    """Turn faults of the disk that `path` lies on into our errors.

    An OSError that is not a fault of the disk (no such file, say) passes unchanged.

    Raises:
        StalledError: the disk is full, or another program holds the file.
        DamagedError: SQLite finds the file damaged.
        StorageError: the file cannot be written, or the disk fails.
    """
    try:
        yield
    except sqlite3.Error as fault:
        raise as_error(fault, path) from fault
    except OSError as fault:
        if fault.errno not in _DISK:
            raise
        raise as_error(fault, path) from fault


def as_error(fault: OSError | sqlite3.Error, path: Path) -> StorageError:
    """The error to raise instead of a fault at `path`."""
    if isinstance(fault, OSError):
        place = Path(os.fsdecode(fault.filename)) if fault.filename else path
        if fault.errno in _FULL:
            return _full(place, quota=fault.errno == errno.EDQUOT)
        return _unwritable(place, fault.strerror or str(fault))
    code = getattr(fault, "sqlite_errorcode", 0) & _CODES
    if code == sqlite3.SQLITE_FULL:
        return _full(path)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StalledError(f"{path} is held by {holders(path)}; end that program")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DamagedError(f"{path} is damaged ({fault})")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _free(path) < LITTLE:
        return _full(path)
    if code == sqlite3.SQLITE_CANTOPEN and path.is_dir():
        return StorageError(f"{path}: expected a journal, got a folder; remove it")
    return _unwritable(path, str(fault))


def create(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a new file, whole or not at all.

    Raises:
        FileExistsError: it is there already.
        StalledError: the disk is full.
        StorageError: the file cannot be written there.
    """
    with at(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
        except BaseException:
            path.unlink()
            raise


def write(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that even a power cut leaves either the new content or the old."""
    partial = path.with_name(f"{path.name}.new")
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def claim(path: Path, who: str) -> IO[str]:
    """Lock a file, and with it the folder that it lies in, until the returned file is closed.

    Args:
        path: the lock file.
        who: what has such a folder, for the message: "run", say.

    Raises:
        StorageError: another process has the lock, or the file cannot be created (StalledError:
            the disk is full).
    """
    with at(path):
        file = locks.hold(path, f"process {os.getpid()}")
    if file is None:
        raise StorageError(
            f"{path.parent} is in use by {holders(path)}; stop that, or name another folder: "
            f"each {who} has one of its own"
        )
    return file


def prepare(db: sqlite3.Connection) -> None:
    """Make a database a journal: what is committed survives a power cut. Call it within `at`.

    Raises:
        DamagedError: the database is damaged.
    """
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    ((report, *_),) = db.execute("PRAGMA quick_check(1)").fetchmany(1)
    if report != "ok":
        (_, _, path), *_ = db.execute("PRAGMA database_list").fetchall()
        raise DamagedError(f"{path} is damaged ({' '.join(report.split())})")
    # On a read-only file system a journal opens, but its first write fails.
    db.execute("BEGIN IMMEDIATE")
    db.rollback()


def set_aside(path: Path) -> Path:
    """Rename a damaged journal and SQLite's files beside it; return the journal's new path."""
    names = [path.with_name(f"{path.name}.damaged-{n}") for n in range(1, SET_ASIDE + 1)]
    aside = next((name for name in names if not name.exists()), names[-1])
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + end).replace(aside.with_name(aside.name + end))
    return aside


class Patience:
    """Repeats work until the disk has room; logs when the waiting begins and ends. Thread-safe.

    Args:
        say: called with what is waited for, and with "" when the waiting is over.
        stopped: waits for so many seconds, and returns whether to stop.
    """

    def __init__(
        self,
        say: Callable[[str], None] = lambda _: None,
        stopped: Callable[[float], bool] | None = None,
    ) -> None:
        self._say, self._stopped = say, stopped or threading.Event().wait
        self._lock = threading.Lock()
        self._stalled: set[object] = set()

    @property
    def waiting(self) -> bool:
        """Whether any work is waiting for the disk now."""
        return bool(self._stalled)

    def attempt(self, work: Callable[[], T]) -> T:
        """What `work` returns; it is repeated until the disk has room.

        Raises:
            StalledError: the disk is full, and we were told to stop.
        """
        key = object()
        while True:
            try:
                result = work()
            except StalledError as fault:
                self.met(fault, key)
                if self._stopped(RETRY_S):
                    raise
            except BaseException:
                self.over(key)
                raise
            else:
                self.over(key)
                return result

    def met(self, fault: StalledError, key: object) -> None:
        """The work that `key` stands for must wait; logs it unless other work waits already."""
        with self._lock:
            first = not self._stalled
            self._stalled.add(key)
        if first:
            log.error("%s; waiting for that", fault)
            self._say(str(fault))

    def over(self, key: object) -> None:
        """The work that `key` stands for is done or given up; logs it if no other work waits."""
        with self._lock:
            last = self._stalled == {key}
            self._stalled.discard(key)
        if last:
            log.info("the disk takes what was waiting; going on")
            self._say("")


def full(path: Path) -> StalledError | None:
    """The error to raise if the disk that a path lies on is full or nearly full; else None."""
    return _full(path) if _free(path) < LITTLE else None


def _full(path: Path, *, quota: bool = False) -> StalledError:
    disk = _stat(path)
    what = f"{_free(path):,} bytes are free"
    if quota:
        what = "this user's quota is used up"
    elif disk is not None and disk.f_files and not disk.f_favail:
        what = "it takes no more files: all inodes are in use"
    return StalledError(f"the disk is full at {path.absolute()} ({what}); make room")


def _unwritable(path: Path, why: str) -> StorageError:
    disk = _stat(path)
    if disk is not None and disk.f_flag & os.ST_RDONLY:
        return StorageError(
            f"{path}: the file system is read-only; mount it for writing, or name another folder. "
            "A card that became so by itself is failing: look at dmesg"
        )
    if not path.parent.exists():
        return gone(path.parent)
    place = path if path.exists() else path.parent
    if not os.access(place, os.R_OK | os.W_OK):
        return StorageError(
            f"{path}: this user may not write there; give it the right, or name another folder"
        )
    return StorageError(f"{path}: {why}; look at the disk (dmesg), or name another folder")


def gone(folder: Path) -> StorageError:
    """The error to raise if a folder no longer exists."""
    return StorageError(
        f"{folder} is gone: it was removed while it was in use, or its disk was taken out; start "
        "again when that is mended"
    )


def _stat(path: Path) -> os.statvfs_result | None:
    for place in (path, *path.parents):
        with suppress(OSError):
            return os.statvfs(place)
    return None


def _free(path: Path) -> int:
    """Bytes that this user may still write on the disk that a path lies on."""
    disk = _stat(path)
    return LITTLE if disk is None else disk.f_bavail * disk.f_frsize


def holders(path: Path) -> str:
    """The other processes that have a file open, as far as this user may see; for messages."""
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with suppress(OSError):
            if any(os.path.realpath(fd) == str(path.resolve()) for fd in process.glob("fd/*")):
                names.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
    return ", ".join(names) or "another process"
