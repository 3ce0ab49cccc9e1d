"""A folder of blobs, named by their content, and the pull protocol that fills it.

The receiver asks (`Want`). The sender answers chunk by chunk (`Chunk`, or `Gone`) and remembers
nothing. After a lost connection, a power cut or a restart of either side, the receiver asks for
what is missing. It alone decides how much is on the way at a time: a device keeps a small window,
an orchestrator shares one budget among all devices.

On disk a whole blob is a file named by its digest. A blob on the way is two files:
`<digest>.*.part` holds its bytes, `<digest>.*.have` one byte for each chunk. A chunk is marked
there after its bytes are written, so a killed process leaves no mark without its bytes. A power cut
may: the system writes the two files to the disk in any order. The whole is verified against the
digest before it gets its name, so neither file needs to be trusted.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from wire import messages, storage
from wire.errors import TransferError
from wire.messages import BlobRef, Chunk, Gone, Want
from wire.storage import Patience, sync_folder

TRIES = 3  # requests for a chunk, with no chunk arriving, before a small piece is asked for
PROBE_BYTES = 1024

T = TypeVar("T")
Send = Callable[[Want | Chunk | Gone, bytes], None]


class BlobStore:
    """Blobs in a folder.

    Args:
        folder: is created if it does not exist.
        chunk_bytes: the chunk size in the refs that this store returns.
        patience: waits while `put` and `create` find the disk full; without it they raise.

    Raises:
        StorageError: the folder cannot be created.
    """

    def __init__(
        self, folder: Path, chunk_bytes: int = 128 * 1024, patience: Patience | None = None
    ) -> None:
        self.folder = folder
        self.chunk_bytes = chunk_bytes
        self._patience = patience
        with storage.at(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a blob lies if it is here."""
        return self.folder / digest

    def has(self, digest: str) -> bool:
        """Whether the whole blob is here."""
        return self.path(digest).exists()

    def ref(self, digest: str) -> BlobRef:
        """The ref of a blob that is here.

        Raises:
            TransferError: it has more chunks than a blob may have.
        """
        try:
            return BlobRef(digest, self.path(digest).stat().st_size, self.chunk_bytes)
        except ValueError as fault:
            raise TransferError(f"blob {digest:.12}: {fault}") from fault

    def put(self, data: bytes) -> BlobRef:
        """Store bytes as a blob; its ref."""
        with self.create() as sink:
            sink.write(data)
        return sink.ref

    @contextmanager
    def create(self) -> Iterator["Sink"]:
        """Write a blob piece by piece; `ref` is set when the block ends without an exception.

        Raises:
            StorageError: the disk is full, or cannot be written.
        """
        partial = self.folder / f"new-{os.getpid()}-{id(self):x}-{os.urandom(4).hex()}"
        try:
            handle = self._patiently(lambda: os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666))
            try:
                sink = Sink(lambda data: self._patiently(lambda: os.write(handle, data)))
                yield sink
                self._patiently(lambda: os.fsync(handle))
            finally:
                os.close(handle)
            digest = sink.digest.hexdigest()
            self._patiently(lambda: partial.replace(self.path(digest)))
            sync_folder(self.folder)
            sink.ref = self.ref(digest)
        finally:
            partial.unlink(missing_ok=True)

    def _patiently(self, work: Callable[[], T]) -> T:
        def attempt() -> T:
            with storage.at(self.folder):
                return work()

        return self._patience.attempt(attempt) if self._patience else attempt()

    def keep_only(self, digests: set[str]) -> None:
        """Delete every other blob, and every other transfer's files."""
        for path in self.folder.iterdir():
            if path.name.split(".")[0] not in digests:
                path.unlink(missing_ok=True)

    def answer(self, want: Want, send: Send) -> None:
        """Send the chunks that were asked for, or `Gone` if the blob is not here."""
        try:
            with self.path(want.digest).open("rb") as file:
                for index in want.chunks:
                    file.seek(index * want.chunk_bytes)
                    send(Chunk(want.digest, index), file.read(want.chunk_bytes))
        except FileNotFoundError:
            send(Gone(want.digest), b"")


class Sink:
    """A blob being written.

    Args:
        write: writes the first of some bytes, and returns how many it has written.
    """

    def __init__(self, write: Callable[[memoryview], int]) -> None:
        self._write = write
        self.digest = hashlib.sha256()
        self.ref: BlobRef

    def write(self, data: bytes) -> None:
        """Append bytes."""
        remaining = memoryview(data)
        while remaining:
            remaining = remaining[self._write(remaining) :]
        self.digest.update(data)


class Fetch:
    """One blob being pulled into a store.

    Pass the sender's answers to `chunk` and `gone`, and call `wants` whenever something has
    happened, until `done` is true. Times are monotonic seconds, passed in.

    A broker may drop large messages without telling anybody. So if chunks were asked for `TRIES`
    times and none came, the first `PROBE_BYTES` of the blob are asked for instead. If these arrive
    twice, the sender is there and the chunks are too large.

    Args:
        store: where the blob goes.
        ref: the blob.
        window: at most so many chunks are on the way at a time.
        retry_s: a chunk that has not come by then is asked for again.
        owner: the sender; keeps apart what several senders of one blob have sent.
        settings: the file with the sender's `chunk_bytes`, for messages.
    """

    def __init__(
        self,
        store: BlobStore,
        ref: BlobRef,
        *,
        window: int = 8,
        retry_s: float = 10.0,
        owner: str = "",
        settings: str = "run.toml",
    ) -> None:
        self.store, self.ref = store, ref
        self._settings = settings
        self._tried: Counter[int] = Counter()  # how often each chunk was asked for
        self._largest = min(ref.chunk_bytes, ref.size)  # bytes of every chunk but the last
        self._arrived = False  # whether such a chunk has: then they are not too large
        self._probed_s: float | None = None
        self._suspected = False
        self.window, self.retry_s = window, retry_s
        self.done = store.has(ref.digest)
        self._asked: dict[int, float] = {}
        self._spoiled = False
        self._digest, self._digested = hashlib.sha256(), 0  # SHA-256 of the first so many chunks
        self._part = store.folder / f"{ref.digest}.{owner}.part"
        self._have_path = store.folder / f"{ref.digest}.{owner}.have"
        self._have = bytearray()
        if self.done:
            return
        with storage.at(store.folder):
            self._resume()

    def _resume(self) -> None:
        """Go on with what came before, or begin."""
        ref = self.ref
        resumable = self._have_path.exists() and self._part.exists()
        if resumable and self._part.stat().st_size == ref.size:
            self._have = bytearray(self._have_path.read_bytes())
        if not resumable or len(self._have) != ref.chunks:
            self._restart()
        self._finish()

    @property
    def received(self) -> int:
        """Bytes that are here, rounded up to whole chunks."""
        if self.done:
            return self.ref.size
        return min(self.ref.size, self._have.count(1) * self.ref.chunk_bytes)

    @property
    def in_flight(self) -> int:
        """How many chunks were asked for and are not here yet."""
        return len(self._asked)

    def wants(self, now: float, *, room: int | None = None) -> Want | None:
        """What to ask for now: new chunks if the window has room, and late ones again.

        Args:
            now: monotonic seconds.
            room: at most so many more chunks, if transfers share a budget.
        """
        if self.done:
            return None
        self.expire(now)
        if not self._asked and self._stuck():
            return self._probe(now)
        free = self.window - len(self._asked)
        room = free if room is None else min(free, room)
        # Half a window at a time keeps the pipe full without a question for every chunk.
        unasked = min(self.window, self.ref.chunks - self._have.count(1) - len(self._asked))
        if room < min(2, unasked) or free < min(max(2, self.window // 2), unasked):
            return None
        self._look_around()
        if self.done:
            return None
        missing: list[int] = []
        index = self._have.find(0)
        while index != -1 and len(missing) < min(room, messages.MAX_WANT):
            if index not in self._asked:
                missing.append(index)
            index = self._have.find(0, index + 1)
        if not missing:
            if not self._asked:  # all chunks came, but the disk was full at the end
                with storage.at(self.store.folder):
                    self._finish()
            return None
        self._asked |= dict.fromkeys(missing, now)
        self._tried.update(missing)
        return Want(self.ref.digest, self.ref.chunk_bytes, tuple(missing))

    def expire(self, now: float) -> bool:
        """Give up waiting for chunks that did not come within `retry_s`; whether there were any."""
        late = [index for index, asked in self._asked.items() if now - asked > self.retry_s]
        for index in late:
            del self._asked[index]
        return bool(late)

    def forget_asked(self) -> None:
        """Forget what was asked for: the connection was lost, or the sender has started again."""
        self._asked.clear()
        self._probed_s = None

    def chunk(self, message: Chunk, body: memoryview) -> bool:
        """Store one chunk, and return True; ignore it if it is here already.

        Raises:
            TransferError: its number or length is wrong, the whole blob failed its digest twice,
                or chunks are too large for the broker.
            StorageError: the disk cannot store it; a full disk may do so later.
        """
        self._look_around()
        if self.done:
            return False
        if not 0 <= message.index < self.ref.chunks:
            raise TransferError(
                f"blob {self.ref.digest:.12}: chunk {message.index} of {self.ref.chunks}"
            )
        at = message.index * self.ref.chunk_bytes
        expected = min(self.ref.chunk_bytes, self.ref.size - at)
        if len(body) == PROBE_BYTES < expected and message.index == 0:
            self._probe_arrived()
            return False
        if len(body) != expected:
            raise TransferError(
                f"blob {self.ref.digest:.12}: chunk {message.index} has {len(body)} bytes, "
                f"expected {expected}"
            )
        self._asked.pop(message.index, None)
        self._arrived |= expected == self._largest
        if self._have[message.index]:
            return False
        with storage.at(self.store.folder):
            _write_at(self._part, at, body)
            _write_at(self._have_path, message.index, b"\1")
            self._have[message.index] = 1
            if message.index == self._digested:
                self._digest.update(body)
                self._digested += 1
            self._finish()
        return True

    def discard(self) -> None:
        """Remove what has come of a blob that nobody needs any more, unless it is whole."""
        for path in (self._part, self._have_path):
            path.unlink(missing_ok=True)

    def gone(self) -> None:
        """The sender does not have the blob.

        Raises:
            TransferError: always.
        """
        raise TransferError(f"blob {self.ref.digest:.12}: its sender no longer has it")

    def _stuck(self) -> bool:
        tries = max(self._tried.values(), default=0)
        return tries >= TRIES and not self._arrived and self._largest > PROBE_BYTES

    def _probe(self, now: float) -> Want | None:
        if self._probed_s is not None and now - self._probed_s <= self.retry_s:
            return None
        self._probed_s = now
        return Want(self.ref.digest, PROBE_BYTES, (0,))

    def _probe_arrived(self) -> None:
        """The sender is there. It may only just be back, so ask for the chunks once more."""
        if self._probed_s is None:
            return
        if self._suspected:
            raise TransferError(
                f"blob {self.ref.digest:.12}: its chunks of {self._largest:,} bytes do not come, "
                f"however often they are asked for, and one of {PROBE_BYTES:,} bytes does: the "
                "broker seems to take no messages so large. Set a smaller chunk_bytes in "
                f"{self._settings} ({max(PROBE_BYTES, self._largest // 8)}, say), or raise the "
                "broker's limit (Mosquitto: max_packet_size, message_size_limit)"
            )
        self._suspected, self._probed_s = True, None
        self._tried.clear()

    def _look_around(self) -> None:
        """Be done if another transfer has brought the same blob."""
        if not self.done and self.store.has(self.ref.digest):
            self.done = True
            self._asked.clear()
            self._part.unlink(missing_ok=True)
            self._have_path.unlink(missing_ok=True)

    def _restart(self) -> None:
        self._have_path.unlink(missing_ok=True)  # first: if we are killed, no mark is without bytes
        self._have = bytearray(self.ref.chunks)
        self._asked.clear()
        self._digest, self._digested = hashlib.sha256(), 0
        with self._part.open("wb") as file:
            try:
                file.truncate(self.ref.size)  # sparse: a declared size takes no disk
            except OSError as fault:
                if fault.errno != errno.EFBIG:
                    raise
                raise TransferError(
                    f"blob: {self.ref.size} bytes are more than a file may have here ({self._part})"
                ) from fault
        self._have_path.write_bytes(self._have)

    def _finish(self) -> None:
        if self._have.count(0):
            return
        whole = self._digest.copy()  # a copy: if the disk is full at the end, this is done again
        with self._part.open("rb") as file:
            # Chunks that came in order are in the digest. Those that did not, or came before a
            # restart, are read here.
            file.seek(self._digested * self.ref.chunk_bytes)
            while piece := file.read(self.ref.chunk_bytes):
                whole.update(piece)
            os.fsync(file.fileno())
        digest = whole.hexdigest()
        if digest != self.ref.digest:
            # A power cut may have kept the marks and lost the bytes, so pull all again, once.
            self._restart()
            if self._spoiled:
                raise TransferError(
                    f"blob: expected SHA-256 {self.ref.digest}, got {digest}, twice; its sender or "
                    "the disk is damaged"
                )
            self._spoiled = True
            return
        self._part.replace(self.store.path(self.ref.digest))
        sync_folder(self.store.folder)
        self._have_path.unlink(missing_ok=True)
        self.done = True


def _write_at(path: Path, at: int, data: bytes | memoryview) -> None:
    """Overwrite a part of an existing file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
