"""Codecs of float tensors, named by specs: `float32`, `hadamard|q=4`, `eden|b=2|mse`.

A spec is a few stages joined by `|`:

    spec       = codec ["|zstd"]
    codec      = "float32" | "float16"
               | ("identity" | "hadamard" | "kashin") ["|s=" rate] "|q=" bits
               | "eden|b=" bits ["|mse"] | "drive" ["|mse"]
               | "relu|q=" (bits | "1.5")

    float32    the values themselves; the only lossless codec
    float16    the values in half precision, up to 65,504
    q          1 to 8 bits a value: evenly spaced levels between a block's minimum and maximum, with
               random rounding, so that E[decode(encode(x))] = x (`uniform`)
    s          over 0 to 1: the share of coefficients to send; unbiased too (`uniform`)
    identity   values as they are; zeros stay zeros and constants constants         |
    hadamard   a random rotation, which makes the range smaller                     | (`transforms`)
    kashin     a redundant rotation: 18 % more coefficients, an even smaller range  |
    eden       rotation, and the best levels for the normal distribution: at 2 bits a seventh of
               hadamard|q=2's error (`eden`); b from 0.05 to 8, also fractions. Unbiased, for
               updates; with `mse` the least error, for downloads. drive is eden|b=1
    relu       for feature maps behind a ReLU: an exact zero, and a fitted clip level; 1.5 bits are
               three levels (`relu`)
    zstd       Zstandard around any of them; helps if zeros or a few levels dominate (`entropy`)

Bytes are little-endian. Values are cut into blocks. The bytes of a block:

    codec                         values   bytes
    float32, float16              4,096    4 or 2 a value
    identity, hadamard            4,096    min float32, step float32, k levels of q bits
    kashin                        3,481    the same, of 4,096 coefficients
    eden                          4,096    scale float32, levels of b bits
    relu                          1,024    scale float32, levels of q bits (2 for 1.5)

with k = max(1, round(s * 4096)) levels, packed as in `packing`. The last block, the tail, is padded
to a multiple of eight (identity, relu), to a power of two (hadamard: 8 or more, eden: 64 or more),
or to a power of two with 15 % to spare (kashin); so by less than a block in all.

Random signs, places and roundings come from `wire.seeds`, so a seed gives the same ones everywhere.
float32, float16 and identity encode and decode to the same on every processor; relu decodes to the
same. The others compute sums, and processors sum in different orders: decoded values agree to 1e-6
of the block's largest, and a coefficient on the border between two levels may be encoded as either.
On one machine the same seed and values give the same bytes with every codec.

Lossy codecs take magnitudes up to 2^100: so sums and squares stay within float32.
"""

import difflib
import re
from functools import lru_cache

from wire.codecs.codec import Cast, Codec, Coder, Lattice
from wire.codecs.draws import Floats
from wire.codecs.eden import Eden
from wire.codecs.relu import TERNARY, Relu
from wire.codecs.transforms import Hadamard, Identity, Kashin, Transform
from wire.codecs.uniform import Uniform
from wire.errors import CodecError

__all__ = ["Codec", "Floats", "Lattice", "parse"]

_NUMBER = r"\d{1,3}(?:\.\d{1,4})?"
_SPEC = re.compile(
    rf"""
    (?: (?P<cast>float32|float16)
      | (?P<transform>identity|hadamard|kashin) (?:\|s=(?P<s>{_NUMBER}))? \|q=(?P<q>\d{{1,3}})
      | (?: eden\|b=(?P<b>{_NUMBER}) | drive ) (?P<mse>\|mse)?
      | relu\|q=(?P<levels>1\.5|\d{{1,3}})
    ) (?P<zstd>\|zstd)?
    """,
    re.VERBOSE | re.ASCII,
)
_TRANSFORMS: dict[str, Transform] = {
    "identity": Identity(),
    "hadamard": Hadamard(),
    "kashin": Kashin(),
}
_CASTS = {
    "float32": Cast("float32", "<f4", lossless=True, highest=3.4028234663852886e38),
    "float16": Cast("float16", "<f2", lossless=False, highest=65504.0),
}
_KNOWN = (
    *_CASTS, "float32|zstd", "float16|zstd", "drive", "drive|mse",
    *(f"{t}|q={n}" for t in (*_TRANSFORMS, "relu") for n in (8, 4, 2)),
    *(f"{t}|s=0.25|q=4" for t in _TRANSFORMS),
    *(f"eden|b={n}{mse}" for n in (2, 4) for mse in ("", "|mse")),
    "relu|q=4|zstd", "relu|q=1.5|zstd", "identity|q=8|zstd",
)  # fmt: skip


@lru_cache(maxsize=1024)  # specs come from the network: bounded
def parse(spec: str) -> Codec:
    """The codec of a spec.

    Raises:
        CodecError: the codec is unknown (the message names the nearest known spec), or a number is
            out of range.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        near = difflib.get_close_matches(spec[:64], _KNOWN, n=1, cutoff=0.0)[0]
        raise CodecError(f"unknown codec {spec!r:.80}; did you mean {near!r}?")
    return Codec(_coder(spec, match), compressed=match["zstd"] is not None)


def _coder(spec: str, match: re.Match[str]) -> Coder:
    if match["cast"]:
        return _CASTS[match["cast"]]
    if match["transform"]:
        rate, bits = float(match["s"] or 1), int(match["q"])
        if not 0 < rate <= 1:
            raise CodecError(f"codec {spec!r}: s must be over 0 to 1, got {rate:g}")
        name = match["transform"]
        return Uniform(name, _TRANSFORMS[name], rate, _levels(spec, bits))
    if match["levels"]:
        if match["levels"] == "1.5":
            return Relu(TERNARY, 2)
        bits = _levels(spec, int(match["levels"]))
        return Relu(2**bits - 1, bits)
    share = float(match["b"] or 1)
    if not 0.05 <= share <= 8:
        raise CodecError(f"codec {spec!r}: b must be 0.05 to 8 bits, got {share:g}")
    return Eden(share, mse=match["mse"] is not None)


def _levels(spec: str, bits: int) -> int:
    if not 1 <= bits <= 8:
        raise CodecError(f"codec {spec!r}: q must be 1 to 8 bits, got {bits}")
    return bits
