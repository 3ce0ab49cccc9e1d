"""All codecs promise exact bytes, declared sizes and finite values, or raise CodecError."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.extensions import signs
from wire import codecs, frames, tensors
from wire.errors import CodecError

LOSSLESS = ["float32", "float32|zstd"]
SIGNED = [
    *LOSSLESS, "float16", "float16|zstd",
    "identity|q=8", "identity|q=3", "identity|s=0.3|q=4", "identity|q=4|zstd",
    "hadamard|q=8", "hadamard|q=4", "hadamard|q=1", "hadamard|s=0.25|q=1", "hadamard|s=0.01|q=8",
    "kashin|q=4", "kashin|q=1", "kashin|s=0.5|q=2|zstd",
    "eden|b=0.05", "eden|b=0.5", "eden|b=0.5|mse", "drive", "drive|mse", "eden|b=1.5",
    "eden|b=2", "eden|b=2|mse", "eden|b=3.25|mse", "eden|b=5", "eden|b=8|mse", "eden|b=2|zstd",
]  # fmt: skip
RELU = ["relu|q=1", "relu|q=1.5", "relu|q=3", "relu|q=4", "relu|q=8", "relu|q=2|zstd"]
SPECS = SIGNED + RELU
RAMP = np.linspace(-1, 1, 20, dtype=np.float32)


def coded(spec, values, seed=0):
    """The values after encoding and decoding."""
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=seed, name="x")
    return codec.decode(body, len(values), seed=seed, name="x")


def valid(spec, values):
    """The values in a form that the codec takes: none below zero for feature maps."""
    return np.abs(values) if spec.startswith("relu") else values


@settings(max_examples=400)
@given(
    hnp.arrays(
        np.float32,
        st.integers(0, 5000),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False),
    ),
    st.sampled_from(SPECS),
    st.integers(0, 2**64 - 1),
)
def test_any_vector_round_trips_in_the_declared_size(values, spec, seed):
    codec = codecs.parse(spec)
    values = valid(spec, values)
    if spec.startswith("float16"):
        values = np.clip(values, -65504, 65504)
    body = codec.encode(values, seed=seed, name="x")
    if codec.fixed_size:
        assert len(body) == codec.size(len(values))
    else:
        assert len(body) <= codec.size(len(values))
    assert body == codec.encode(values, seed=seed, name="x")
    decoded = codec.decode(body, len(values), seed=seed, name="x")
    assert decoded.shape == values.shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()
    if spec in LOSSLESS:
        np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 63, 1024, 1025, 3481, 3482, 4096, 4099, 140_001])
def test_zeros_and_denormals_of_any_length_stay_what_they_are(spec, n):
    """Zeros stay exact; denormals change by at most a small multiple of 1e-42 sqrt(n)."""
    np.testing.assert_array_equal(coded(spec, np.zeros(n, np.float32)), np.zeros(n, np.float32))
    tiny = np.random.default_rng(n).integers(-99, 99, n).astype(np.float32) * np.float32(1e-44)
    tiny = valid(spec, tiny)
    largest = 40 if "s=" in spec or "b=0" in spec else 3  # subsampling scales what it keeps
    bound = 1e-42 * largest * np.sqrt(max(n, 1))
    assert np.abs(coded(spec, tiny) - tiny).max(initial=0) <= bound


@pytest.mark.parametrize(
    "spec", ["identity|q=1", "identity|q=8", "identity|s=1|q=2", "float32|zstd"]
)
@pytest.mark.parametrize("n", [1, 7, 4096, 4099])
def test_constants_are_exact_where_values_stay_in_their_places(spec, n):
    constant = np.full(n, 1.2345, np.float32)
    np.testing.assert_array_equal(coded(spec, constant), constant)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ("float16", 1e-7), ("hadamard|q=4", 0.039), ("hadamard|q=1", 12.0), ("kashin|q=4", 0.026),
        ("drive", 0.571), ("drive|mse", 0.363), ("eden|b=2", 0.133), ("eden|b=4|mse", 0.0095),
    ],
)  # fmt: skip
def test_a_constant_costs_a_rotated_codec_no_more_than_normal_values(spec, error):
    constant = np.full(8192, -3.7, np.float32)
    decoded = coded(spec, constant)
    assert np.square(decoded - constant).sum() / np.square(constant).sum() < 1.3 * error


@pytest.mark.parametrize("spec", SPECS)
def test_a_seed_gives_the_same_bytes_and_another_seed_others(spec):
    values = valid(spec, np.random.default_rng(0).standard_normal(9000).astype(np.float32))
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=3, name="x")
    assert codec.encode(values.copy(), seed=3, name="y") == body
    draws = not spec.startswith(("float", "relu"))
    assert (codec.encode(values, seed=4, name="x") != body) == draws


@pytest.mark.parametrize("spec", SPECS)
def test_a_block_is_the_same_whatever_stands_in_front_of_it(spec, monkeypatch):
    """The format does not depend on how many blocks are encoded at a time."""
    values = valid(spec, np.random.default_rng(1).standard_normal(30_000).astype(np.float32))
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=5, name="x")
    decoded = codec.decode(body, len(values), seed=5, name="x")
    monkeypatch.setattr("wire.codecs.codec.GROUP", 1 << 13)
    again = codec.decode(body, len(values), seed=5, name="x")
    np.testing.assert_allclose(again, decoded, rtol=1e-4, atol=1e-4)
    fresh = coded(spec, values, seed=5)
    # Matrix products of other shapes may round a value on a border to the other level.
    assert np.square(fresh - decoded).sum() <= 1e-3 * np.square(decoded).sum()


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_depend_on_values_and_not_on_where_they_lie(spec):
    values = valid(spec, np.random.default_rng(6).standard_normal(12_000).astype(np.float32))
    codec = codecs.parse(spec)
    for laid in (values[::3], values[::-1], values.astype(">f4")):
        expected = codec.encode(np.array(laid, np.float32), seed=0, name="x")
        assert codec.encode(laid, seed=0, name="x") == expected


@pytest.mark.parametrize("spec", SPECS)
def test_encoding_leaves_its_input_alone(spec):
    values = valid(spec, np.random.default_rng(2).standard_normal(5000).astype(np.float32))
    values.setflags(write=False)
    before = values.tobytes()
    codecs.parse(spec).encode(values, seed=0, name="x")
    assert values.tobytes() == before


@pytest.mark.parametrize("spec", SPECS)
def test_decoding_takes_little_more_memory_than_its_values(spec):
    n = 1 << 20
    values = valid(spec, np.random.default_rng(3).standard_normal(n).astype(np.float32))
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=0, name="x")
    tracemalloc.start()
    codec.decode(body, n, seed=0, name="x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * n


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [2, 9000])
def test_values_that_are_not_finite_are_refused_by_tensor_name(spec, value, n):
    values = np.ones(n, np.float32)
    values[-1] = value
    with pytest.raises(CodecError, match=r"'layer.weight' holds NaN or infinity"):
        codecs.parse(spec).encode(values, seed=0, name="layer.weight")


@pytest.mark.parametrize(
    ("spec", "value", "text"),
    [
        ("float16", 65505.0, "'w' holds 65505; float16 takes -65504 to 65504"),
        ("float16", -1e6, r"'w' holds -1e\+06; float16 takes -65504 to 65504"),
        ("relu|q=4", -1e-9, r"'w' holds -1e-09; relu\|q=4 takes 0 to 1.26765e\+30"),
        ("eden|b=2", 2e30, r"'w' holds 2e\+30; eden\|b=2 takes -1.26765e\+30 to 1.26765e\+30"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(spec, value, text):
    with pytest.raises(CodecError, match=text):
        codecs.parse(spec).encode(np.array([0, value], np.float32), seed=0, name="w")


@pytest.mark.parametrize("spec", SPECS)
def test_parse_gives_back_its_spec(spec):
    codec = codecs.parse(spec)
    assert codec.spec == spec.replace("drive", "eden|b=1")
    assert codecs.parse(codec.spec) == codec
    assert codec.fixed_size == (not spec.endswith("|zstd"))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("hadamart|q=4", r"did you mean 'hadamard\|q=4'"),
        ("hadamard|q=9", "q must be 1 to 8 bits, got 9"),
        ("relu|q=0", "q must be 1 to 8 bits, got 0"),
        ("kashin|s=0|q=4", "s must be over 0 to 1, got 0"),
        ("hadamard|s=1.5|q=4", "s must be over 0 to 1, got 1.5"),
        ("eden|b=0.04", "b must be 0.05 to 8 bits, got 0.04"),
        ("eden|b=9", "b must be 0.05 to 8 bits, got 9"),
        ("eden|2", r"did you mean 'eden\|b=2'"),
        ("", "unknown codec"),
        ("float64", "did you mean 'float"),
        ("relu|q=4|zsdt", r"did you mean 'relu\|q=4\|zstd'"),
        ("zstd|float32", "unknown codec"),
        ("hadamard|q=4|s=0.5", "unknown codec"),
        ("eden|b=\u0662", "unknown codec"),
        ("x" * 100_000, "unknown codec 'xxx"),
    ],
)
def test_unknown_specs_name_the_nearest_and_numbers_their_range(spec, text):
    with pytest.raises(CodecError, match=text) as fault:
        codecs.parse(spec)
    assert len(str(fault.value)) < 200


@pytest.mark.parametrize(
    ("spec", "n", "size"),
    [
        ("float16", 5, 10),
        ("hadamard|q=4", 8192, 2 * (8 + 2048)),
        ("hadamard|s=0.25|q=1", 8192, 2 * (8 + 128)),
        ("kashin|q=2", 2 * 3481, 2 * (8 + 1024)),
        ("eden|b=2", 8192, 2 * (4 + 1024)),
        ("eden|b=2.5", 8192, 2 * (4 + 1280)),
        ("eden|b=0.5", 8192, 2 * (4 + 256)),
        ("relu|q=4", 2048, 2 * (4 + 512)),
    ],
)
def test_a_block_takes_its_bits_and_one_or_two_floats(spec, n, size):
    assert codecs.parse(spec).size(n) == size


def test_a_body_of_another_length_is_refused():
    codec = codecs.parse("hadamard|q=4")
    body = codec.encode(RAMP, seed=0, name="x")
    for wrong in (body[:-1], body + b"\0", b""):
        with pytest.raises(CodecError, match=f"take 24 bytes, got {len(wrong)}"):
            codec.decode(wrong, 20, seed=0, name="x")


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.endswith("zstd")])
@pytest.mark.parametrize("filler", [b"\xff\xff\xff\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f"])
def test_a_hostile_scale_is_refused_or_harmless(spec, filler):
    """The whole body is filled with NaN, infinity, or the largest float32."""
    codec = codecs.parse(spec)
    body = (filler * codec.size(5000))[: codec.size(5000)]
    try:
        decoded = codec.decode(body, 5000, seed=0, name="x")
    except CodecError as fault:
        assert "'x' decodes to NaN or infinity" in str(fault)  # noqa: PT017
    else:
        assert np.isfinite(decoded).all()


@pytest.mark.parametrize("family", codecs._FAMILIES)
def test_a_spec_belongs_to_one_family(family):
    for spec in family.examples:
        assert [f for f in codecs._FAMILIES if f.parse(spec)] == [family]


def test_a_codec_is_one_file_and_one_line_of_the_table(monkeypatch):
    monkeypatch.setattr(codecs, "_FAMILIES", (*codecs._FAMILIES, signs.FAMILY))
    codecs.parse.cache_clear()
    values = np.array([[1, -2, 3], [-4, 5, 0]], np.float32)
    frame = frames.decode(tensors.pack([("w", values, "signs|zstd")], seed=0))
    found = tensors.unpack(frame, where="payload", spec="signs|zstd")
    np.testing.assert_array_equal(found["w"], np.array([[1, -1, 1], [-1, 1, 1]]) * 2.5)
    with pytest.raises(CodecError, match="unknown codec 'sings'; did you mean 'signs'"):
        codecs.parse("sings")
    codecs.parse.cache_clear()
