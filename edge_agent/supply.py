"""Pulls what an order needs from the orchestrator: artifact, state, teacher.

An artifact is pulled only once. Its manifest is a blob, and names the artifact's other files by
their digests; these are blobs as well. Files that are here already are not asked for again.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ondevice.config import AgentConfig
from wire import storage
from wire.artifact import Artifact, open_artifact
from wire.blobs import BlobStore, Fetch
from wire.errors import ArtifactError, TransferError
from wire.manifest import Manifest
from wire.messages import BlobRef, Chunk, Gone, Order, Want

log = logging.getLogger("edge-agent")


class Shelf:
    """The complete artifacts on this device: one folder, with a sub-folder for each digest.

    The disk of a device cannot be trusted, least of all after a power cut. So each artifact is read
    and verified at its first use, and again whenever size, time or inode of a file have changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._verified: dict[str, tuple[Artifact, frozenset[tuple[str | int, ...]]]] = {}

    def path(self, digest: str) -> Path:
        """The folder of an artifact, if it is here."""
        return self.folder / digest

    def has(self, digest: str) -> bool:
        """Whether an artifact is here, intact or not."""
        return self.path(digest).exists()

    def open(self, digest: str) -> Artifact:
        """An artifact, verified.

        Raises:
            ArtifactError: a file is damaged; the folder is removed, so that the next order
                pulls the artifact again.
        """
        folder = self.path(digest)
        try:
            stamp = _stamp(folder)
            verified = self._verified.get(digest)
            if verified is None or verified[1] != stamp:
                verified = open_artifact(folder, expect_digest=digest), stamp
                self._verified[digest] = verified
        except ArtifactError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return verified[0]


def _stamp(folder: Path) -> frozenset[tuple[str | int, ...]]:
    """Name, size, time and inode of each file."""
    try:
        with os.scandir(folder) as files:
            stats = [(file.name, file.stat()) for file in files]
    except OSError:  # open_artifact says what is wrong
        return frozenset()
    return frozenset((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)


class Supply:
    """Pulls the blobs that one order needs.

    Args:
        order: names the blobs.
        blobs: where they go.
        shelf: where the artifact goes once it is complete.
        config: the agent's settings.

    Raises:
        TransferError: a blob is larger than `max_download_bytes`; nothing is asked for.
    """

    def __init__(self, order: Order, blobs: BlobStore, shelf: Shelf, config: AgentConfig) -> None:
        self.order, self._blobs, self._shelf, self._config = order, blobs, shelf, config
        self._manifest: Manifest | None = None
        self._assembled = self._intact()
        self._queue = [ref for ref in (order.state, order.teacher) if ref]
        if not self._assembled:
            self._queue.insert(0, order.artifact)
        for ref in self._queue:
            self._check(ref)
        self._fetch: Fetch | None = None

    def advance(self) -> bool:
        """Move on to the next blob when one is done; whether everything is here."""
        window, retry_s = self._config.window, self._config.retry_s
        while self._fetch is None or self._fetch.done:
            self._arrived()
            if not self._queue:
                return True
            self._fetch = Fetch(self._blobs, self._queue[0], window=window, retry_s=retry_s)
        return False

    @property
    def progress(self) -> tuple[int, int]:
        """How many bytes of the current blob are here, and its size."""
        return (self._fetch.received, self._fetch.ref.size) if self._fetch else (0, 0)

    def wants(self, now_s: float) -> Iterator[Want]:
        """What to ask for now."""
        if not self.advance() and self._fetch and (want := self._fetch.wants(now_s)):
            yield want

    def reconnected(self) -> None:
        """Ask again for what was asked for: the requests may be lost."""
        if self._fetch:
            self._fetch.forget_asked()

    def take(self, message: Chunk | Gone, body: memoryview) -> None:
        """Take an answer; an answer to an earlier request is ignored.

        Raises:
            TransferError: the chunk is wrong, or the sender no longer has the blob.
        """
        if not self._fetch or message.digest != self._fetch.ref.digest:
            return
        if isinstance(message, Gone):
            self._fetch.gone()
        else:
            self._fetch.chunk(message, body)

    def artifact(self) -> Artifact:
        """The artifact of the order, once everything is here.

        Raises:
            ArtifactError: a file is damaged; the next order pulls the artifact again.
        """
        return self._shelf.open(self.order.artifact.digest)

    def _intact(self) -> bool:
        """Whether the artifact is here and intact; a damaged one is removed and pulled again."""
        if not self._shelf.has(self.order.artifact.digest):
            return False
        try:
            self.artifact()
        except ArtifactError as fault:
            log.warning("%s; pulling it again", fault)
            return False
        return True

    def _check(self, ref: BlobRef) -> None:
        if ref.size > (most := self._config.max_download_bytes):
            raise TransferError(
                f"blob {ref.digest:.12} has {ref.size} bytes, this device accepts at most "
                f"{most}; raise max_download_bytes in agent.toml"
            )

    def _arrived(self) -> None:
        if self._fetch is not None:
            self._queue.remove(self._fetch.ref)
            self._fetch = None
        if self._assembled:
            return
        if self._manifest is None:
            if not self._blobs.has(self.order.artifact.digest):
                return
            raw = self._blobs.path(self.order.artifact.digest).read_bytes()
            self._manifest = Manifest.parse(raw)
            chunk_bytes = self.order.artifact.chunk_bytes
            files = [BlobRef(f.sha256, f.bytes, chunk_bytes) for f in self._manifest.files.values()]
            for ref in files:
                self._check(ref)
            self._queue[:0] = files
        if all(self._blobs.has(f.sha256) for f in self._manifest.files.values()):
            with storage.at(self._shelf.folder):
                self._assemble(self._manifest)

    def _assemble(self, manifest: Manifest) -> None:
        folder = self._shelf.path(self.order.artifact.digest)
        building = folder.with_suffix(".new")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        digests = {name: f.sha256 for name, f in manifest.files.items()}
        # The manifest comes last: `measure` looks for it, and takes a folder with one for whole.
        for name, digest in {**digests, "manifest.json": self.order.artifact.digest}.items():
            shutil.copyfile(self._blobs.path(digest), building / name)
        building.rename(folder)
        self._assembled = True
