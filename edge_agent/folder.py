"""The state folder of an agent; a lock keeps a second agent out.

lock            locked while an agent runs
journal.db      the open order, its result, and which weights file is current
blobs/          payloads, named by digest
artifacts/      training artifacts, named by digest
weights-*, owed-*   what the device keeps for its runs
"""

import errno
import os
from contextlib import ExitStack, closing
from pathlib import Path

from edge_agent.journal import Journal
from edge_agent.kept import Kept
from edge_agent.supply import Shelf
from ondevice import meter
from wire import storage
from wire.blobs import BlobStore
from wire.errors import SettingsError, StalledError
from wire.storage import Patience


class Folder:
    """An open state folder.

    Args:
        path: is created if it does not exist.
        chunk_bytes: the chunk size of results that the orchestrator pulls.
        patience: waits while the disk is too full for a result's blobs.

    Attributes:
        state_id, first_session: see `Journal.begin_sessions`.

    Raises:
        SettingsError: the folder cannot be created.
        StalledError: the disk is full.
        StorageError: it cannot be written, or another agent uses it.
    """

    def __init__(self, path: Path, chunk_bytes: int, patience: Patience) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as fault:
            error = storage.as_error(fault, path)
            if isinstance(error, StalledError) or fault.errno == errno.EROFS:
                raise error from fault
            raise SettingsError(
                f"state: {path} cannot be made ({fault.strerror}); name a folder that this user "
                "may write to, /var/lib/stillhouse/state for the packaged service"
            ) from fault
        self._lock_file = path / "lock"
        with ExitStack() as opened:
            self._lock = opened.enter_context(storage.claim(self._lock_file, "edge-agent"))
            self.blobs = BlobStore(path / "blobs", chunk_bytes, patience)
            self.journal = opened.enter_context(closing(Journal(path / "journal.db")))
            self.state_id, self.first_session = self.journal.begin_sessions(meter.machine())
            self._opened = opened.pop_all()
        self.kept = Kept(path, self.journal)
        self.shelf = Shelf(path / "artifacts")

    @property
    def here(self) -> bool:
        """Whether the locked folder is still in place: nobody has removed or replaced it."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), self._lock_file.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Close the journal and release the lock."""
        self._opened.close()
