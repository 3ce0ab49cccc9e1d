"""Named tensors in a frame: the form in which weights, updates, features and logits are sent.

The header holds `seed` and a list of the tensors in the order of the body. Each entry has name,
dtype, shape and codec spec; if its codec has no fixed size (`zstd`), also `size`, the length of the
encoded tensor in bytes. The body holds the encoded tensors one after another, without gaps.
Integers are sent as they are (spec "raw").

A **policy**, MATRICES[/VECTORS], names the codecs of a model's tensors: `hadamard|q=4`, or
`eden|b=2/float16`. The first codec is for weight matrices and filters, which have two dimensions or
more; the second is for biases and norm parameters, and is `float32` by default. Caldas et al. 2018,
section 3: the small vectors are sensitive and cost next to nothing.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire import codecs, frames, records
from wire.codecs import Codec, Lattice
from wire.errors import CodecError, FrameError
from wire.frames import Frame, Kind

Array = NDArray[Any]
Named = tuple[str, Array, str]
Agreed = str | Mapping[str, str] | None

RAW_DTYPES = ("int64", "int32", "uint16", "uint8")
KNOWN_DTYPES = ("float32", *RAW_DTYPES)
MAX_TENSORS = 4096
MAX_NAME = 256
MAX_VALUES = 1 << 26  # for all tensors of a frame together: 256 MiB as float32


@dataclass(frozen=True)
class Policy:
    """The codecs for a model's float tensors."""

    matrices: Codec
    vectors: Codec

    @property
    def spec(self) -> str:
        """The text from which `policy` makes this."""
        return f"{self.matrices.spec}/{self.vectors.spec}"

    def codec(self, axes: int) -> Codec:
        """The codec for a tensor with this many axes."""
        return self.matrices if axes >= 2 else self.vectors


def policy(spec: str) -> Policy:
    """The policy that MATRICES[/VECTORS] names.

    Raises:
        CodecError: a codec does not exist, or there are more than two.
    """
    matrices, *others = spec.split("/")
    if len(others) > 1:
        raise CodecError(
            f"policy {spec!r:.80}: expected MATRICES[/VECTORS], a codec or two, got "
            f"{1 + len(others)}"
        )
    return Policy(codecs.parse(matrices), codecs.parse(others[0] if others else "float32"))


@dataclass(frozen=True)
class Entry:
    """One tensor's entry in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: str
    size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME:
            raise ValueError(f"name of {len(self.name)} characters, expected 1 to {MAX_NAME}")
        if (
            len(self.shape) > 8
            or math.prod(max(d, 1) for d in self.shape) >= 2**40
            or any(d < 0 for d in self.shape)
        ):
            raise ValueError(f"shape of {self.name!r} is out of range: {self.shape!r:.80}")
        if (self.spec == "raw") != (self.dtype in RAW_DTYPES) or self.dtype not in KNOWN_DTYPES:
            raise ValueError(f"{self.name!r}: no {self.dtype!r:.40} tensor as {self.spec!r:.80}")
        try:
            _ = self.codec
        except CodecError as fault:
            raise ValueError(f"{self.name!r}: {fault}") from fault
        if self.size is None:
            if not self.fixed_size:
                raise ValueError(f"{self.name!r} as {self.spec} needs a size, got none")
        elif self.fixed_size or not 0 <= self.size <= self._largest:
            raise ValueError(
                f"{self.name!r} as {self.spec}: expected "
                f"{'no size' if self.fixed_size else f'a size of 0 to {self._largest} bytes'}, "
                f"got {self.size}"
            )

    @property
    def codec(self) -> Codec | None:
        """The codec of its spec; None for integers, which have none."""
        return None if self.spec == "raw" else codecs.parse(self.spec)

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        return math.prod(self.shape)

    @property
    def fixed_size(self) -> bool:
        """Whether shape and spec determine the length of the encoded tensor."""
        return self.codec is None or self.codec.fixed_size

    @property
    def bytes(self) -> int:
        """Length of the encoded tensor in bytes."""
        return self._largest if self.size is None else self.size

    @property
    def _largest(self) -> int:
        if self.codec is None:
            return self.values * np.dtype(self.dtype).itemsize
        return self.codec.size(self.values)


@dataclass(frozen=True)
class Part:
    """One encoded tensor of a frame."""

    entry: Entry
    body: memoryview
    seed: int

    def array(self) -> Array:
        """The tensor.

        Raises:
            CodecError: the body does not fit its entry.
        """
        entry = self.entry
        if entry.codec is None:
            flat = np.frombuffer(self.body, np.dtype(entry.dtype).newbyteorder("<"))
            flat = flat.astype(entry.dtype)
        else:
            seed = _seed(self.seed, entry.name)
            flat = entry.codec.decode(self.body, entry.values, seed=seed, name=entry.name)
        return flat.reshape(entry.shape)

    def lattice(self) -> Lattice | None:
        """The tensor as it was quantized, if its codec has levels; see `Codec.lattice`.

        Raises:
            CodecError: the body does not fit its entry.
        """
        entry = self.entry
        if entry.codec is None:
            return None
        return entry.codec.lattice(self.body, entry.shape, name=entry.name)


@dataclass(frozen=True)
class _Header:
    seed: int
    tensors: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if len(self.tensors) > MAX_TENSORS:
            raise ValueError(f"{len(self.tensors)} tensors, limit {MAX_TENSORS}")
        if len({entry.name for entry in self.tensors}) != len(self.tensors):
            raise ValueError("two tensors have one name")


def weights(state: Mapping[str, Array], spec: str) -> list[Named]:
    """The tensors of a model, each with its codec by the policy `spec`.

    Raises:
        CodecError: `spec` is not a policy.
    """
    rule = policy(spec)
    return [(name, array, rule.codec(array.ndim).spec) for name, array in state.items()]


def with_prefix(prefix: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The same tensors, each named `prefix/NAME`."""
    return {f"{prefix}/{name}": array for name, array in tensors.items()}


def strip_prefix(prefix: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors that are named `prefix/NAME`, by NAME; the others are left out."""
    start = f"{prefix}/"
    return {n.removeprefix(start): a for n, a in tensors.items() if n.startswith(start)}


def pack(tensors: Iterable[Named], *, seed: int) -> bytes:
    """The bytes of one TENSORS frame.

    Args:
        tensors: name, array (float32 or an integer dtype), codec spec ("raw" for integers).
        seed: seeds the codecs' random signs and roundings.

    Raises:
        CodecError: a value is NaN or infinite, a spec is unknown, or a dtype cannot be sent.
    """
    entries, bodies = [], []
    for name, array, spec in tensors:
        dtype, size = array.dtype.name, None
        if dtype == "float32":
            codec = codecs.parse(spec)
            body = codec.encode(array.reshape(-1), seed=_seed(seed, name), name=name)
            size = None if codec.fixed_size else len(body)
            spec = codec.spec  # noqa: PLW2901 - its canonical spelling
        else:
            spec = "raw"  # noqa: PLW2901 - integers have no other codec
            body = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        try:
            entries.append(Entry(name, dtype, array.shape, spec, size))
        except ValueError as fault:
            raise CodecError(str(fault)) from fault
        bodies.append(body)
    header = records.plain(_Header(seed, tuple(entries)))
    for entry in header["tensors"]:
        if entry["size"] is None:
            del entry["size"]
    return frames.encode(Kind.TENSORS, header, *bodies)


def load(
    path: Path, *, where: str, most: int = MAX_VALUES, spec: Agreed = None
) -> dict[str, Array]:
    """The tensors of a file that holds one frame; for the arguments see `unpack`.

    Raises:
        WireError: the file is not one intact frame, or `unpack` refuses it.
    """
    with path.open("rb") as file:
        try:
            (frame,) = frames.read(file, max_bytes=path.stat().st_size)
        except FrameError as fault:
            raise FrameError(f"{where}: {fault}") from fault
        except ValueError as fault:
            raise FrameError(f"{where}: expected one frame ({fault})") from fault
    return unpack(frame, where=where, most=most, spec=spec)


def unpack(
    frame: Frame, *, where: str, most: int = MAX_VALUES, spec: Agreed = None
) -> dict[str, Array]:
    """The tensors of a frame.

    Args:
        frame: of kind TENSORS.
        where: how to name it in messages.
        most: how many values all tensors together may have. This is checked before anything is
            decoded: a subsampled or compressed body may be thousands of times smaller than its
            values.
        spec: the policy that the float tensors must follow, or the codec of each tensor by name
            (float32 for a missing name). None accepts any codec.

    Raises:
        CodecError: the header is malformed, there are too many values, a codec is not the agreed
            one, or an encoded tensor does not fit its entry.
    """
    encoded = parts(frame, where=where, most=most, spec=spec)
    return {name: part.array() for name, part in encoded.items()}


def parts(
    frame: Frame, *, where: str, most: int = MAX_VALUES, spec: Agreed = None
) -> dict[str, Part]:
    """The tensors of a frame, not decoded yet; for arguments and errors see `unpack`."""
    if frame.kind is not Kind.TENSORS:
        raise CodecError(f"{where}: expected a TENSORS frame, got {frame.kind.name}")
    header = records.build(_Header, frame.header, where=where, error=CodecError)
    values = sum(entry.values for entry in header.tensors)
    if values > most:
        raise CodecError(f"{where}: the tensors have {values} values together, limit {most}")
    declared = sum(entry.bytes for entry in header.tensors)
    if declared != len(frame.body):
        raise CodecError(f"{where}: the tensors take {declared} bytes, got {len(frame.body)}")
    if spec is not None:
        _agree(header.tensors, spec, where)
    encoded, at = {}, 0
    for entry in header.tensors:
        encoded[entry.name] = Part(entry, frame.body[at : at + entry.bytes], header.seed)
        at += entry.bytes
    return encoded


def _agree(entries: tuple[Entry, ...], agreed: str | Mapping[str, str], where: str) -> None:
    for entry in entries:
        if isinstance(agreed, str):
            expected = policy(agreed).codec(len(entry.shape)).spec
        else:
            expected = codecs.parse(agreed.get(entry.name, "float32")).spec
        if entry.spec not in ("raw", expected):
            raise CodecError(f"{where}: {entry.name!r} was to come as {expected}, not {entry.spec}")


def _seed(seed: int, name: str) -> int:
    """The seed of one tensor: each tensor of a frame draws from a different stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
