"""Codecs: exact bytes, unbiased values, bounded errors, and nothing but CodecError on bad input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wire import codecs, frames, tensors
from wire.errors import CodecError, WireError

SPECS = ["float32", "identity|q=8", "identity|q=3", "hadamard|q=8", "hadamard|q=4", "hadamard|q=1"]
RAMP = np.linspace(-1, 1, 20, dtype=np.float32)

# Both sides of a fleet may run different numpy versions and processors: these bytes must not move.
GOLDEN = {
    "float32": "000080bf790d65bff31a4abf6c282fbfe53514bfbd86f2beafa1bcbea2bc86be28af21be369457bd"
    "3694573d28af213ea2bc863eafa1bc3ebd86f23ee535143f6c282f3ff31a4a3f790d653f0000803f",
    "identity|q=8": "000080bf8180003c000d1b283643515e6c798693a1aebcc9d7e4f2ffffffffff",
    "identity|q=3": "000080bf2549923e4012692359b6f6ffff",
    "hadamard|q=4": "74baa6bfc31c043e948b8976a9a86759c9c6bdb0edf3aca3",
}


@pytest.mark.parametrize("spec", GOLDEN)
def test_golden_bytes(spec):
    assert codecs.parse(spec).encode(RAMP, seed=7, name="x").hex() == GOLDEN[spec]


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 512, 4096])
def test_rotation_is_the_dense_hadamard_matrix_and_its_own_inverse(n):
    rows = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    dense = codecs.hadamard(n)
    np.testing.assert_allclose(dense @ dense.T, np.eye(n), atol=1e-5)
    np.testing.assert_allclose(codecs.rotate(rows), rows @ dense, atol=2e-5)
    np.testing.assert_allclose(codecs.rotate(codecs.rotate(rows)), rows, atol=2e-5)


@pytest.mark.parametrize("spec", ["identity|q=2", "hadamard|q=1", "hadamard|q=3"])
def test_the_mean_of_many_decodings_is_the_value(spec):
    codec = codecs.parse(spec)
    values = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    draws = np.stack([
        codec.decode(codec.encode(values, seed=s, name="x"), 300, seed=s, name="x")
        for s in range(4000)
    ])  # fmt: skip
    standard_error = draws.std(axis=0) / np.sqrt(len(draws))
    # A value next to a level moves less than once in all draws: no error below one such move.
    resolution = np.ptp(draws) / len(draws)
    z = (draws.mean(axis=0) - values) / np.maximum(standard_error, resolution)
    assert np.abs(z).max() < 5.5
    assert abs(z.mean()) < 5 / np.sqrt(300)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_is_at_most_one_step(bits):
    codec = codecs.parse(f"identity|q={bits}")
    values = np.random.default_rng(bits).uniform(-3, 5, 9000).astype(np.float32)
    decoded = codec.decode(codec.encode(values, seed=1, name="x"), 9000, seed=1, name="x")
    step = (values.max() - values.min()) / (2**bits - 1)
    assert np.abs(decoded - values).max() <= step * 1.0001


def test_rotation_lowers_the_error_of_a_spiky_vector():
    values = np.zeros(4096, np.float32)
    values[5] = 100.0
    values += np.random.default_rng(0).standard_normal(4096).astype(np.float32) * 0.1

    def error(spec):
        codec = codecs.parse(spec)
        got = codec.decode(codec.encode(values, seed=2, name="x"), 4096, seed=2, name="x")
        return float(np.square(got - values).sum() / np.square(values).sum())

    assert error("hadamard|q=2") < error("identity|q=2") / 10


@pytest.mark.parametrize("spec", ["identity|q=1", "identity|q=8"])
@pytest.mark.parametrize("n", [1, 7, 4096, 4099])
def test_constants_and_the_zeros_of_a_relu_survive_exactly(spec, n):
    codec = codecs.parse(spec)
    constant = np.full(n, 1.2345, np.float32)
    decoded = codec.decode(codec.encode(constant, seed=0, name="x"), n, seed=0, name="x")
    np.testing.assert_array_equal(decoded, constant)
    relu = np.maximum(np.random.default_rng(n).standard_normal(n).astype(np.float32), 0)
    decoded = codec.decode(codec.encode(relu, seed=0, name="x"), n, seed=0, name="x")
    if relu.min() == 0:
        assert (decoded[relu == 0] == 0).all()


@settings(max_examples=150, deadline=None)
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
    body = codec.encode(values, seed=seed, name="x")
    assert len(body) == codec.size(len(values))
    assert body == codec.encode(values, seed=seed, name="x")
    decoded = codec.decode(body, len(values), seed=seed, name="x")
    assert decoded.shape == values.shape
    if codec.lossless:
        np.testing.assert_array_equal(decoded, values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_tensor_name(value):
    with pytest.raises(CodecError, match=r"'layer.weight' holds NaN or infinity"):
        codecs.parse("hadamard|q=4").encode(
            np.array([0, value], np.float32), seed=0, name="layer.weight"
        )


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("hadamart|q=4", r"did you mean 'hadamard\|q=4'"),
        ("hadamard|q=9", "q must be 1 to 8"),
        ("hadamard|q=0", "q must be 1 to 8"),
        ("", "unknown codec"),
        ("float16", "did you mean 'float32'"),
    ],
)
def test_unknown_specs_name_the_nearest(spec, text):
    with pytest.raises(CodecError, match=text):
        codecs.parse(spec)


def test_a_body_of_another_length_is_refused():
    codec = codecs.parse("hadamard|q=4")
    body = codec.encode(RAMP, seed=0, name="x")
    for wrong in (body[:-1], body + b"\0", b""):
        with pytest.raises(CodecError, match="take 24 bytes, got"):
            codec.decode(wrong, 20, seed=0, name="x")


def test_tensors_round_trip_and_small_vectors_stay_exact():
    state = {"w": RAMP.reshape(4, 5), "b": RAMP[:5].copy(), "s": np.float32(3).reshape(())}
    data = tensors.pack(tensors.weights(state, "hadamard|q=8"), seed=1)
    back = tensors.unpack(frames.decode(data), where="test")
    np.testing.assert_array_equal(back["b"], state["b"])
    assert back["s"].shape == ()
    np.testing.assert_allclose(back["w"], state["w"], atol=0.02)
    assert (back["w"] != state["w"]).any()


def test_labels_travel_as_integers():
    labels = np.array([0, 9, 65535], np.uint16)
    back = tensors.unpack(frames.decode(tensors.pack([("y", labels, "raw")], seed=0)), where="t")
    np.testing.assert_array_equal(back["y"], labels)
    assert back["y"].dtype == np.uint16


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_tensor_headers_end_in_a_wire_error(data):
    entry = st.fixed_dictionaries({
        "name": st.text(max_size=3),
        "dtype": st.sampled_from(["float32", "int64", "object", "float64", ""]),
        "shape": st.lists(st.integers(-1, 2**41), max_size=3),
        "spec": st.sampled_from([*SPECS, "raw", "pickle"]),
    })  # fmt: skip
    header = {"seed": 0, "tensors": data.draw(st.lists(entry, min_size=1, max_size=3))}
    frame = frames.decode(frames.encode(frames.Kind.TENSORS, header, data.draw(st.binary())))
    try:
        decoded = tensors.unpack(frame, where="hostile")
    except WireError:
        return
    assert sum(array.nbytes for array in decoded.values()) <= 64 * len(frame.body) + 64
