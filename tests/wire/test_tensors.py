"""Tensors in frames: each has its codec and declared size, and the receiver limits their number."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.test_codecs import RAMP, SPECS
from wire import codecs, frames, tensors
from wire.errors import CodecError, WireError
from wire.frames import Kind

STATE = {"w": RAMP.reshape(4, 5), "b": RAMP[:5].copy(), "s": np.float32(3).reshape(())}

# A matrix, a vector and labels, as devices in the field send them.
GOLDEN = (
    "53544c48010992000000240000000000000082a47365656407a774656e736f72739384a46e616d65a177a5647479"
    "7065a7666c6f61743332a57368617065920405a473706563ac6964656e746974797c713d3484a46e616d65a162a5"
    "6474797065a7666c6f61743332a573686170659103a473706563a7666c6f6174333284a46e616d65a179a5647479"
    "7065a675696e743136a573686170659102a473706563a3726177000080bf8988083e002143557688aacbedfeffff"
    "000080bf790d65bff31a4abf0100ffffbd69cedabadbf0be722d3d9d1ff1246919e7512e3c3d774fc0f8016467e6"
    "9b30"
)


def test_golden_bytes_of_a_frame():
    given = [("w", RAMP.reshape(4, 5), "identity|q=4"), ("b", RAMP[:3], "float32")]
    labels = ("y", np.array([1, 65535], np.uint16), "raw")
    assert tensors.pack([*given, labels], seed=7).hex() == GOLDEN


def unpacked(data, **options):
    return tensors.unpack(frames.decode(data), where="test", **options)


def test_small_vectors_stay_exact_unless_the_policy_says_otherwise():
    back = unpacked(tensors.pack(tensors.weights(STATE, "hadamard|q=8"), seed=1))
    np.testing.assert_array_equal(back["b"], STATE["b"])
    assert back["s"].shape == ()
    np.testing.assert_allclose(back["w"], STATE["w"], atol=0.02)
    assert (back["w"] != STATE["w"]).any()
    named = tensors.weights(STATE, "eden|b=2/float16")
    assert [(name, spec) for name, _, spec in named] == [
        ("w", "eden|b=2"), ("b", "float16"), ("s", "float16")
    ]  # fmt: skip
    back = unpacked(tensors.pack(named, seed=1))
    np.testing.assert_array_equal(back["b"], STATE["b"].astype(np.float16))


def test_a_policy_is_one_codec_or_two():
    policy = tensors.policy("eden|b=2")
    assert (policy.matrices.spec, policy.vectors.spec) == ("eden|b=2", "float32")
    assert tensors.policy("drive/float16").spec == "eden|b=1/float16"
    assert tensors.policy(policy.spec) == policy


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("hadamard|q=4/float32/float32", "expected MATRICES.*got 3"),
        ("hadamard|q=4/", "unknown codec ''"),
        ("/float32", "unknown codec ''"),
        ("eden|b=2/flaot16", "did you mean 'float16'"),
        ("eden|b=20", "b must be 0.05 to 8 bits, got 20"),
        ("raw", "unknown codec 'raw'"),
    ],
)
def test_nonsense_is_no_policy(spec, reason):
    with pytest.raises(CodecError, match=reason):
        tensors.policy(spec)
    with pytest.raises(CodecError, match=reason):
        tensors.weights(STATE, spec)


def test_labels_travel_as_integers_whatever_the_policy():
    labels = np.array([0, 9, 65535], np.uint16)
    for spec in ("raw", "eden|b=2"):
        back = unpacked(tensors.pack([("y", labels, spec)], seed=0))
        np.testing.assert_array_equal(back["y"], labels)
        assert back["y"].dtype == np.uint16


@pytest.mark.parametrize("dtype", ["float64", "complex64", "object", "bool"])
def test_other_dtypes_do_not_travel(dtype):
    with pytest.raises(CodecError, match=f"no '{dtype}' tensor"):
        tensors.pack([("w", np.zeros(3, dtype), "float32")], seed=0)


@pytest.mark.parametrize("spec", SPECS)
def test_a_header_has_a_size_where_the_codec_has_none(spec):
    values = np.abs(RAMP)
    frame = frames.decode(tensors.pack([("x", values, spec)], seed=0))
    (entry,) = frame.header["tensors"]
    if codecs.parse(spec).fixed_size:
        assert set(entry) == {"name", "dtype", "shape", "spec"}
    else:
        assert entry["size"] == len(frame.body)


def packed(entry, body, seed=0):
    header = {"seed": seed, "tensors": [entry]}
    return frames.encode(Kind.TENSORS, header, body)


@pytest.mark.parametrize(
    ("spec", "size", "reason"),
    [
        ("float32|zstd", None, "needs a size, got none"),
        ("float32|zstd", -1, "expected a size of 0 to 144 bytes, got -1"),
        ("float32|zstd", 145, "expected a size of 0 to 144 bytes, got 145"),
        ("float32|zstd", True, "expected int"),
        ("float32", 80, "expected no size, got 80"),
        ("raw", 80, "test: .*no 'float32' tensor as 'raw'"),
        ("float32|zsdt", 80, "test: .*did you mean 'float32|zstd'"),
    ],
)
def test_a_size_that_no_tensor_has_is_refused(spec, size, reason):
    entry = {"name": "x", "dtype": "float32", "shape": [20], "spec": spec}
    if size is not None:
        entry["size"] = size
    with pytest.raises(CodecError, match=reason):
        unpacked(packed(entry, bytes(80)))


def test_tensors_side_by_side_are_cut_where_their_sizes_say():
    rng = np.random.default_rng(0)
    given = {f"t{i}": np.abs(rng.standard_normal(50 * i)).astype(np.float32) for i in range(9)}
    specs = ["relu|q=4|zstd", "float32", "float32|zstd"] * 3
    data = tensors.pack([(n, a, s) for (n, a), s in zip(given.items(), specs, strict=True)], seed=1)
    back = unpacked(data)
    for (name, array), spec in zip(given.items(), specs, strict=True):
        np.testing.assert_allclose(back[name], array, atol=0 if "float" in spec else 0.3)


@pytest.mark.parametrize("shape", [(0, 1024), (0, 16, 32, 32), (2, 0)])
@pytest.mark.parametrize("spec", ["relu|q=4", "identity|q=8"])
def test_a_tensor_without_values_has_no_levels(spec, shape):
    frame = frames.decode(tensors.pack([("h", np.zeros(shape, np.float32), spec)], seed=0))
    part = tensors.parts(frame, where="test")["h"]
    assert part.lattice() is None
    assert part.array().shape == shape


def test_tensors_of_more_values_than_wanted_are_refused_before_any_is_decoded():
    """A subsampled or compressed body can be thousands of times smaller than its values."""
    data = tensors.pack([("w", RAMP.reshape(4, 5), "float32"), ("b", RAMP, "float32")], seed=0)
    assert len(unpacked(data, most=40)) == 2
    with pytest.raises(CodecError, match="test: the tensors have 40 values together, limit 39"):
        unpacked(data, most=39)
    n = tensors.MAX_VALUES + 1
    spec = "identity|s=0.0001|q=1"
    entry = {"name": "x", "dtype": "float32", "shape": [n], "spec": spec}
    bomb = packed(entry, bytes(codecs.parse(spec).size(n)))
    assert len(bomb) < n / 100
    tracemalloc.start()
    with pytest.raises(CodecError, match=f"have {n} values together, limit {n - 1}"):
        unpacked(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_tensors_by_other_codecs_than_agreed_are_refused():
    """A device that answers in another codec would change a run's bytes and errors unnoticed."""
    named = {"w": RAMP.reshape(4, 5), "b": RAMP, "n": np.arange(3, dtype=np.int64)}
    data = tensors.pack(tensors.weights(named, "eden|b=2/float16"), seed=0)
    assert set(unpacked(data, spec="eden|b=2/float16")) == set(named)
    with pytest.raises(CodecError, match=r"test: 'w' was to come as hadamard\|q=2, not eden\|b=2"):
        unpacked(data, spec="hadamard|q=2/float16")
    with pytest.raises(CodecError, match="'b' was to come as float32, not float16"):
        unpacked(data, spec="eden|b=2")


def test_a_file_is_one_frame(tmp_path):
    path = tmp_path / "blob"
    data = tensors.pack([("w", RAMP, "float32")], seed=0)
    path.write_bytes(data)
    np.testing.assert_array_equal(tensors.load(path, where="test")["w"], RAMP)
    for wrong in (b"", data[:-1], data + data):
        path.write_bytes(wrong)
        with pytest.raises(WireError):
            tensors.load(path, where="test")


def test_each_tensor_has_random_numbers_of_its_own():
    same = [(name, RAMP, "hadamard|q=4") for name in ("a", "b")]
    body = frames.decode(tensors.pack(same, seed=0)).body
    assert body[: len(body) // 2] != body[len(body) // 2 :]


@settings(max_examples=400)
@given(st.data())
def test_hostile_tensor_headers_end_in_a_wire_error(data):
    entry = st.fixed_dictionaries(
        {
            "name": st.text(max_size=3),
            "dtype": st.sampled_from(["float32", "int64", "object", "float64", ""]),
            "shape": st.lists(st.integers(-1, 2**41), max_size=3),
            "spec": st.sampled_from([*SPECS, "raw", "pickle"]),
        },
        optional={"size": st.integers(-1, 2**70 - 1).map(lambda n: min(n, 2**63))},
    )
    header = {"seed": 0, "tensors": data.draw(st.lists(entry, min_size=1, max_size=3))}
    frame = frames.decode(frames.encode(Kind.TENSORS, header, data.draw(st.binary())))
    try:
        decoded = tensors.unpack(frame, where="hostile", most=1 << 20)
    except WireError:
        return
    assert sum(array.size for array in decoded.values()) <= 1 << 20
