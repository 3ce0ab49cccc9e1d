"""The contenders: Stillhouse's codecs, and peers that do a part of the same work.

PyTorch's Hadamard transform is the in-place butterfly of log2(n) passes that the published code of
DRIVE and EDEN uses. Here it works on blocks of 4,096 values, as many at a time as our codec, and
quantizes as we do: from minimum to maximum with stochastic rounding, two levels a byte. It draws
signs and roundings from a seed, with PyTorch's generator. It leaves out an incomplete last block.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire import codecs

Floats = NDArray[np.float32]

TORCH, COPY, ZLIB, ZSTD = (
    "pytorch hadamard q=4",
    "memory copy",
    "zlib on float32",
    "zstd on float32",
)
UPDATES = (
    "float32", "float16",
    *(f"identity|q={q}" for q in (1, 2, 4, 8)),
    *(f"hadamard|q={q}" for q in (1, 2, 3, 4, 5, 8)),
    *(f"kashin|q={q}" for q in (1, 2, 3, 4, 8)),
    "hadamard|s=0.25|q=1", "hadamard|s=0.25|q=4", "kashin|s=0.85|q=2",
    "eden|b=0.5", "eden|b=1", "eden|b=1.5", "eden|b=2", "eden|b=3", "eden|b=4",
    "eden|b=0.5|mse", "eden|b=1|mse", "eden|b=1.5|mse", "eden|b=2|mse", "eden|b=3|mse",
    "eden|b=4|mse",
    "float32|zstd", "identity|q=4|zstd", "hadamard|q=4|zstd",
)  # fmt: skip
FEATURES = (
    "float32", "float32|zstd", "float16", "identity|q=4", "identity|q=8", "identity|q=8|zstd",
    "hadamard|q=4", "eden|b=4|mse",
    *(f"relu|q={q}{z}" for q in (1, 2, 3, 4, 8) for z in ("", "|zstd")),
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """A contender.

    Attributes:
        name: a codec's spec, or a peer's name.
        encode: returns what would be sent.
        decode: turns that back into float32 values.
        values: how many values one call handles.
    """

    name: str
    encode: Callable[[], Any]
    decode: Callable[[Any], Floats]
    values: int


def ours(spec: str, values: Floats) -> Contender:
    """Our codec on a vector."""
    codec = codecs.parse(spec)

    def encode() -> bytes:
        return codec.encode(values, seed=1, name=spec)

    def decode(body: bytes) -> Floats:
        return codec.decode(body, len(values), seed=1, name=spec)

    return Contender(spec, encode, decode, len(values))


def peers(values: Floats) -> list[Contender]:
    """The peers on the same vector: PyTorch's transform, a copy, and general compression."""
    return [
        pytorch(values),
        Contender(COPY, values.copy, np.copy, len(values)),
        Contender(ZLIB, lambda: zlib.compress(values.tobytes()), _unzlib, len(values)),
        _zstd(values),
    ]


def _unzlib(body: bytes) -> Floats:
    return np.frombuffer(zlib.decompress(body), np.float32)


def _zstd(values: Floats) -> Contender:
    import zstandard

    def encode() -> bytes:
        return zstandard.ZstdCompressor().compress(values.tobytes())

    def decode(body: bytes) -> Floats:
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(body), np.float32)

    return Contender(ZSTD, encode, decode, len(values))


def pytorch(values: Floats) -> Contender:
    """Hadamard rotation and four bits a value, in PyTorch."""
    import torch
    from torch import Tensor

    from wire.codecs.codec import GROUP
    from wire.codecs.transforms import BLOCK

    whole = torch.from_numpy(values[: max(1, len(values) // BLOCK) * BLOCK].copy())
    if len(whole) < BLOCK:
        whole = torch.nn.functional.pad(whole, (0, BLOCK - len(whole)))
    groups = torch.split(whole.view(-1, BLOCK), GROUP // BLOCK)

    def butterfly(rows: Tensor) -> Tensor:
        half = 1
        while half < BLOCK:
            pairs = rows.view(-1, 2, half)
            pairs[:, 0] += pairs[:, 1]
            pairs[:, 1].mul_(-2).add_(pairs[:, 0])
            half *= 2
        return rows.mul_(1 / math.sqrt(BLOCK))

    def signs(rows: int, random: torch.Generator) -> Tensor:
        return torch.randint(0, 2, (rows, BLOCK), generator=random).mul_(2).sub_(1).float()

    def encode() -> list[tuple[Tensor, Tensor, Tensor]]:
        random, sent = torch.Generator().manual_seed(1), []
        for group in groups:
            rows = butterfly(group * signs(len(group), random))
            low, high = rows.aminmax(dim=1, keepdim=True)
            step = (high - low) / 15
            rows = rows.sub_(low).div_(step).add_(torch.rand(rows.shape, generator=random))
            levels = rows.clamp_(max=15).to(torch.uint8)
            sent.append((low, step, levels[:, ::2] | levels[:, 1::2] << 4))
        return sent

    def decode(sent: list[tuple[Tensor, Tensor, Tensor]]) -> Floats:
        random, decoded_groups = torch.Generator().manual_seed(1), []
        for low, step, packed in sent:
            rows = torch.stack((packed & 15, packed >> 4), dim=2).view(len(packed), BLOCK).float()
            turned = signs(len(rows), random)
            torch.rand(rows.shape, generator=random)  # skip the numbers that the roundings drew
            decoded_groups.append(butterfly(rows.mul_(step).add_(low)).mul_(turned))
        decoded: Floats = torch.cat(decoded_groups).view(-1).numpy()
        return decoded

    return Contender(TORCH, encode, decode, len(whole))
