"""Faults of disks, told apart: full, held by another program, damaged, not to be written.

`sqlite3.Error` is no OSError, and an OSError of `write` names no file: `at` makes one kind of
error of both, which names the place and the remedy. A full disk is waited for (`Patience`).
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
LITTLE = 64 * 1024  # bytes; SQLite tells some full disks as an I/O error
SET_ASIDE = 3  # damaged journals that are kept; a card that fails again and again fills no disk
_FULL = {errno.ENOSPC, errno.EDQUOT}
_DISK = {*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO, errno.ENODEV,
         errno.ESTALE}  # fmt: skip
_CODES = 0xFF  # SQLite's extended codes keep the kind in their lowest byte


@contextmanager
def at(path: Path) -> Iterator[None]:
    """Turn faults of the disk that `path` lies on into errors of ours.

    An OSError that is none of a disk's (no such file, say) passes unchanged.

    Raises:
        StalledError: no room, or another program holds the file.
        DamagedError: SQLite finds the file damaged.
        StorageError: it cannot be written, or the disk fails.
    """
    try:
        yield
    except sqlite3.Error as fault:
        raise told(fault, path) from fault
    except OSError as fault:
        if fault.errno not in _DISK:
            raise
        raise told(fault, path) from fault


def told(fault: OSError | sqlite3.Error, path: Path) -> StorageError:
    """The error to raise in place of a fault that was met at `path`."""
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
        StorageError: it cannot be written there.
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
    """Write a file so that it is whole or as it was before, after a power cut too."""
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
    """Lock a file, and with it the folder that it lies in, until it is closed.

    Raises:
        StorageError: another process has; or the file cannot be made (StalledError: no room).
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
    """Make a journal of a database: what is committed survives a power cut. To be called in `at`.

    Raises:
        DamagedError: it is not whole.
    """
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    ((found, *_),) = db.execute("PRAGMA quick_check(1)").fetchmany(1)
    if found != "ok":
        (_, _, path), *_ = db.execute("PRAGMA database_list").fetchall()
        raise DamagedError(f"{path} is damaged ({' '.join(found.split())})")
    # On a read-only file system a journal opens, and is refused at its first write.
    db.execute("BEGIN IMMEDIATE")
    db.rollback()


def set_aside(path: Path) -> Path:
    """Rename a damaged journal and what SQLite keeps beside it; the new name of the first."""
    names = [path.with_name(f"{path.name}.damaged-{n}") for n in range(1, SET_ASIDE + 1)]
    aside = next((name for name in names if not name.exists()), names[-1])
    for end in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            path.with_name(path.name + end).replace(aside.with_name(aside.name + end))
    return aside


class Patience:
    """Waits where a disk has no room; says so once, and again when there is. For any thread.

    Args:
        say: is told what is waited for, and "" when that is over.
        stopped: waits for so many seconds; true when we are to stop.
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
        """Whether something is waited for now."""
        return bool(self._stalled)

    def attempt(self, work: Callable[[], T]) -> T:
        """Do `work`, as often as it takes.

        Raises:
            StalledError: we are to stop.
        """
        key = object()
        while True:
            try:
                done = work()
            except StalledError as fault:
                self.met(fault, key)
                if self._stopped(RETRY_S):
                    raise
            except BaseException:
                self.over(key)
                raise
            else:
                self.over(key)
                return done

    def met(self, fault: StalledError, key: object) -> None:
        """What `key` stands for cannot be done now; said for the first of them."""
        with self._lock:
            first = not self._stalled
            self._stalled.add(key)
        if first:
            log.error("%s; waiting for that", fault)
            self._say(str(fault))

    def over(self, key: object) -> None:
        """What `key` stands for is done, or given up; said when that was the last."""
        with self._lock:
            last = self._stalled == {key}
            self._stalled.discard(key)
        if last:
            log.info("the disk takes what was waiting; going on")
            self._say("")


def full(path: Path) -> StalledError | None:
    """The error to raise if the disk that a path lies on has next to no room."""
    return _full(path) if _free(path) < LITTLE else None


def _full(path: Path, *, quota: bool = False) -> StalledError:
    found = _stat(path)
    what = f"{_free(path):,} bytes are free"
    if quota:
        what = "this user's quota is used up"
    elif found is not None and found.f_files and not found.f_favail:
        what = "it takes no more files: all inodes are in use"
    return StalledError(f"the disk is full at {path.absolute()} ({what}); make room")


def _unwritable(path: Path, why: str) -> StorageError:
    found = _stat(path)
    if found is not None and found.f_flag & os.ST_RDONLY:
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
    """The error to raise where a folder is not there any more."""
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
    """Bytes that this user may still write on the disk of a path."""
    found = _stat(path)
    return LITTLE if found is None else found.f_bavail * found.f_frsize


def holders(path: Path) -> str:
    """Which other processes have a file open, as far as this user may see, for a message."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with suppress(OSError):
            if any(os.path.realpath(fd) == str(path.resolve()) for fd in process.glob("fd/*")):
                found.append(f"process {process.name} ({(process / 'comm').read_text().strip()})")
    return ", ".join(found) or "another process"
