"""Named tensors in a frame: how weights, updates, features and logits travel and rest.

Header: `seed`, and for each tensor its name, dtype, shape and codec spec, in body order. The body
is the encoded tensors one after another, without gaps. Integers travel raw (spec "raw").
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire import codecs, frames, records
from wire.errors import CodecError
from wire.frames import Frame, Kind

Array = NDArray[Any]
Named = tuple[str, Array, str]

RAW_DTYPES = ("int64", "int32", "uint16", "uint8")
KNOWN_DTYPES = ("float32", *RAW_DTYPES)
MAX_TENSORS = 4096
MAX_NAME = 256


@dataclass(frozen=True)
class Entry:
    """One tensor's place in the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spec: str

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
            raise ValueError(f"{self.name!r}: no {self.dtype} tensor as {self.spec!r}")

    @property
    def values(self) -> int:
        """How many values the tensor has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Length of the encoded tensor."""
        if self.spec == "raw":
            return self.values * np.dtype(self.dtype).itemsize
        return codecs.parse(self.spec).size(self.values)


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
    """The paper's policy: matrices and filters by `spec`, biases and norm parameters as they are.

    Caldas et al. 2018, section 3: the small vectors are sensitive and cost next to nothing.
    """
    return [(name, a, spec if a.ndim >= 2 else "float32") for name, a in state.items()]


def pack(tensors: Iterable[Named], *, seed: int) -> bytes:
    """One TENSORS frame.

    Args:
        tensors: name, array (float32 or an integer dtype), codec spec ("raw" for integers).
        seed: of the codecs' random signs and roundings.

    Raises:
        CodecError: NaN or infinity, an unknown spec, or a dtype that does not travel.
    """
    entries, bodies = [], []
    for name, array, spec in tensors:
        dtype = array.dtype.name
        try:
            entry = Entry(name, dtype, array.shape, spec if dtype == "float32" else "raw")
        except ValueError as fault:
            raise CodecError(str(fault)) from fault
        entries.append(entry)
        if entry.spec == "raw":
            bodies.append(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes())
        else:
            flat = array.reshape(-1)
            bodies.append(codecs.parse(spec).encode(flat, seed=_seed(seed, name), name=name))
    header = records.plain(_Header(seed, tuple(entries)))
    return frames.encode(Kind.TENSORS, header, b"".join(bodies))


def unpack(frame: Frame, *, where: str) -> dict[str, Array]:
    """The tensors of a frame.

    Raises:
        CodecError: the header is not one, or the body's length is not what it says.
    """
    if frame.kind is not Kind.TENSORS:
        raise CodecError(f"{where}: expected a TENSORS frame, got {frame.kind.name}")
    header = records.build(_Header, frame.header, where=where, error=CodecError)
    declared = sum(entry.bytes for entry in header.tensors)
    if declared != len(frame.body):
        raise CodecError(f"{where}: the tensors take {declared} bytes, got {len(frame.body)}")
    tensors: dict[str, Array] = {}
    at = 0
    for entry in header.tensors:
        body = frame.body[at : at + entry.bytes]
        at += entry.bytes
        if entry.spec == "raw":
            flat = np.frombuffer(body, np.dtype(entry.dtype).newbyteorder("<"))
            flat = flat.astype(entry.dtype)
        else:
            seed = _seed(header.seed, entry.name)
            codec = codecs.parse(entry.spec)
            flat = codec.decode(body, entry.values, seed=seed, name=entry.name)
        tensors[entry.name] = flat.reshape(entry.shape)
    return tensors


def _seed(seed: int, name: str) -> int:
    """Another stream for each tensor of a frame."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
