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

Lossy codecs take magnitudes up to 2^100, so that sums and squares stay within float32.

A codec is one file here, with a `FAMILY`, and its name in `_FAMILIES`.
"""

import difflib
from functools import lru_cache

from wire.codecs import cast, eden, relu, uniform
from wire.codecs.codec import Codec, Lattice
from wire.codecs.draws import Floats
from wire.errors import CodecError

__all__ = ["Codec", "Floats", "Lattice", "parse"]

_FAMILIES = (cast.FAMILY, uniform.FAMILY, eden.FAMILY, relu.FAMILY)


@lru_cache(maxsize=1024)  # specs come from the network: bounded
def parse(spec: str) -> Codec:
    """The codec of a spec.

    Raises:
        CodecError: the codec is unknown (the message names the nearest known spec), or a number is
            out of range.
    """
    for family in _FAMILIES:
        if codec := family.parse(spec):
            return codec
    known = [example for family in _FAMILIES for example in family.examples]
    near = difflib.get_close_matches(spec[:64], known, n=1, cutoff=0.0)[0]
    raise CodecError(f"unknown codec {spec!r:.80}; did you mean {near!r}?")
