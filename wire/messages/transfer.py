"""A blob by its content, and the messages that pull it chunk by chunk."""

from dataclasses import dataclass

from wire import checks
from wire.messages.limits import MAX_BLOB_BYTES, MAX_CHUNK_BYTES, MAX_CHUNKS, MAX_WANT


@dataclass(frozen=True)
class BlobRef:
    """A blob by its content: SHA-256 (hex), size, and the size of the chunks it is pulled in."""

    digest: str
    size: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        checks.digest("digest", self.digest)
        checks.within("size", self.size, 0, MAX_BLOB_BYTES, " bytes")
        checks.within("chunk_bytes", self.chunk_bytes, 1024, MAX_CHUNK_BYTES)
        if self.chunks > MAX_CHUNKS:
            raise ValueError(
                f"chunk_bytes: {self.size} bytes in chunks of {self.chunk_bytes} are more than "
                f"{MAX_CHUNKS}; raise it"
            )

    @property
    def chunks(self) -> int:
        """How many chunks the blob has."""
        return -(-self.size // self.chunk_bytes)


@dataclass(frozen=True)
class Want:
    """Asks for chunks of one blob, by their numbers; at most `MAX_WANT` of them."""

    digest: str
    chunk_bytes: int
    chunks: tuple[int, ...]

    def __post_init__(self) -> None:
        BlobRef(self.digest, 0, self.chunk_bytes)
        most = MAX_BLOB_BYTES // self.chunk_bytes
        if not 1 <= len(self.chunks) <= MAX_WANT or not all(0 <= c <= most for c in self.chunks):
            raise ValueError(f"chunks: expected 1 to {MAX_WANT} numbers from 0 to {most}")


@dataclass(frozen=True)
class Chunk:
    """Chunk `index` of a blob; the frame's body holds its bytes."""

    digest: str
    index: int


@dataclass(frozen=True)
class Gone:
    """The sender does not have this blob."""

    digest: str
