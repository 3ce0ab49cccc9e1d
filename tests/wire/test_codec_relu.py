"""Feature maps: zeros stay zero, clipping lowers the error, and Zstandard helps with many zeros."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.unbiased import error
from wire import codecs
from wire.codecs import entropy
from wire.errors import CodecError


def feature_map(seed=0, samples=4):
    """Smooth maps after a ReLU, 16 channels of 32 x 32, half of them zeros: (samples * 16384,)."""
    noise = np.random.default_rng(seed).standard_normal((samples * 16, 40, 40))
    smooth = sum(noise[:, i : i + 32, j : j + 32] for i in range(0, 8, 2) for j in range(0, 8, 2))
    return np.maximum(smooth / 4, 0).astype(np.float32).reshape(-1)


def top(bits):
    """The highest level; 1.5 bits are three levels."""
    return 2 if bits == 1.5 else 2**bits - 1


def coded(spec, values):
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=0, name="h")
    return codec.decode(body, len(values), seed=0, name="h")


@pytest.mark.parametrize("bits", [1, 1.5, *range(2, 9)])
def test_zeros_stay_exact_and_nothing_turns_negative(bits):
    values = feature_map()
    decoded = coded(f"relu|q={bits}", values)
    assert (decoded[values == 0] == 0).all()
    assert (decoded >= 0).all()
    assert len(np.unique(decoded[:1024])) <= 1 + top(bits)


@pytest.mark.parametrize("bits", [1, 1.5, *range(2, 9)])
@pytest.mark.parametrize("n", [1024, 100])
def test_a_block_is_the_best_of_its_four_clip_levels(bits, n):
    """The test tries all in float64, each with the scale that fits its levels best."""
    values = feature_map(round(2 * bits))[:n].astype(np.float64)
    highest, errors = top(bits), []
    for fraction in (1, 0.9, 0.75, 0.6):
        levels = np.minimum(np.rint(values * highest / (fraction * values.max())), highest)
        scale = (levels @ values) / (levels @ levels)
        errors.append(np.square(values - scale * levels).sum())
    decoded = coded(f"relu|q={bits}", values.astype(np.float32))
    assert np.square(values - decoded).sum() == pytest.approx(min(errors), rel=1e-3)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 3, 4])
def test_clipping_pays_at_few_bits(bits):
    values = feature_map()
    blocks = values.reshape(-1, 1024)
    step = blocks.max(axis=1, keepdims=True) / top(bits)
    plain = np.square(blocks - np.rint(blocks / step) * step).sum() / np.square(blocks).sum()
    assert error(f"relu|q={bits}", values)[0] < plain / 1.05


def test_a_channel_has_a_scale_of_its_own():
    values = feature_map(samples=1).reshape(16, 1024) * np.float32(10) ** np.arange(16)[:, None]
    decoded = coded("relu|q=4", values.astype(np.float32).reshape(-1)).reshape(16, 1024)
    errors = np.square(decoded - values).sum(axis=1) / np.square(values).sum(axis=1)
    assert errors.max() < 0.01


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zstd_takes_fewer_bits_than_levels_have_where_zeros_dominate(bits):
    values = feature_map()
    plain, packed = (codecs.parse(f"relu|q={bits}{z}") for z in ("", "|zstd"))
    body = packed.encode(values, seed=0, name="h")
    assert len(body) < 0.85 * plain.size(len(values))
    sparse = np.where(np.arange(len(values)) % 16, 0, values).astype(np.float32)
    body = packed.encode(sparse, seed=0, name="h")
    assert len(body) < 0.5 * plain.size(len(values))


def test_zstd_gives_the_values_of_its_inner_codec():
    values = feature_map()
    for spec in ("relu|q=3", "identity|q=4", "float32", "eden|b=2"):
        np.testing.assert_array_equal(coded(f"{spec}|zstd", values), coded(spec, values))


@settings(max_examples=100)
@given(st.binary(max_size=3000))
def test_zstd_never_makes_bytes_more_than_its_bound(noise):
    assert len(entropy.compress(noise)) <= entropy.most_bytes(len(noise))


@pytest.mark.parametrize("n", [0, 1, 4096, 1_000_000])
def test_zstd_of_noise_grows_by_less_than_its_bound(n):
    values = np.random.default_rng(n).integers(0, 2**32, n, np.uint32).view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(0))
    codec = codecs.parse("float32|zstd")
    body = codec.encode(values, seed=0, name="x")
    assert len(body) <= codec.size(n) <= 4 * n * 1.004 + 64
    np.testing.assert_array_equal(codec.decode(body, n, seed=0, name="x"), values)


def frame(raw, **options):
    return zstandard.ZstdCompressor(**options).compress(raw)


RAW = codecs.parse("relu|q=4").encode(feature_map()[:2048], seed=0, name="h")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (frame(RAW)[:-1], "did not decompress full frame"),
        (frame(RAW) + b"\0", "1 bytes of unused data"),
        (frame(RAW) * 2, "unused data"),
        (frame(RAW[:-1]), f"expected {len(RAW)} bytes in the frame, got {len(RAW) - 1}"),
        (frame(RAW + b"\0"), f"expected {len(RAW)} bytes in the frame, got {len(RAW) + 1}"),
        (frame(bytes(1 << 30)), f"expected {len(RAW)} bytes in the frame, got {1 << 30}"),
        (frame(RAW, write_content_size=False), "got a frame that states no size"),
        (RAW, "Zstandard frame is damaged"),
        (b"", "Zstandard frame is damaged"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd", f"expected {len(RAW)} bytes in the frame, got 0"),
    ],
    ids=["cut", "longer", "twice", "less", "more", "bomb", "unstated", "plain", "empty", "skip"],
)
def test_a_frame_that_is_not_what_it_says_is_refused(body, reason):
    with pytest.raises(CodecError, match=f"'h'.*{reason}"):
        codecs.parse("relu|q=4|zstd").decode(body, 2048, seed=0, name="h")


def test_a_frame_that_lies_about_its_size_is_refused_without_unpacking_it():
    whole = frame(bytes(1 << 20))
    at = zstandard.frame_header_size(whole)
    honest = whole[:at]
    assert zstandard.frame_content_size(honest + whole[at:]) == 1 << 20
    lying = frame(RAW)[: zstandard.frame_header_size(frame(RAW))] + whole[at:]
    assert zstandard.frame_content_size(lying) == len(RAW)
    with pytest.raises(CodecError, match="Zstandard frame is damaged"):
        codecs.parse("relu|q=4|zstd").decode(lying, 2048, seed=0, name="h")


def test_no_values_have_no_frame():
    codec = codecs.parse("relu|q=4|zstd")
    assert codec.encode(np.zeros(0, np.float32), seed=0, name="h") == b""
    with pytest.raises(CodecError, match="'h' has no values, got 3 bytes"):
        codec.decode(b"abc", 0, seed=0, name="h")
