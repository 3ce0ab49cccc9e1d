"""Each attack or accident is refused with its reason, and everything else is admitted."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.rules import admit
from orchestrator.training.shards import shelve
from wire import tensors
from wire.errors import AdmissionError, WireError
from wire.messages import BlobRef, Order, Result

REF = BlobRef("ab" * 32, 1000, 1024)
ORDER = Order("run", 3, 1, REF, 1, 0.1, 7, {"features": "float32"}, data_digest="cd" * 32)
RESULT = Result("pi", "run", 3, 1, 10, "cd" * 32, {"features": REF})
LIMITS = {"features": 1000}
SHAPES = {"w": (2, 3), "m": (3,)}
GOOD = {"w": np.ones((2, 3), np.float32), "m": np.zeros(3, np.float32)}


def test_a_proper_result_is_admitted():
    admit.header(RESULT, ORDER, "pi", 10, LIMITS)
    admit.weights(GOOD, SHAPES, 1.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device": "other"}, "names device 'other', it came from 'pi'"),
        ({"sequence": 2}, "its round is closed"),
        ({"run": "old"}, "its round is closed"),
        ({"round": 9}, "is of round 1, the result says 9"),
        ({"fault": "no memory"}, "could not do it: no memory"),
        ({"fault": "a\nb\x1b[2J"}, r"could not do it: a\\nb\\x1b\[2J$"),
        ({"submodel": "12" * 32}, "expected an update of sub-model whole, got one of 121212121212"),
        ({"blobs": {}}, r"expected payloads \['features'\], got \[\]"),
        ({"blobs": {"features": replace(REF, size=1001)}}, "1001 bytes, limit 1000"),
        ({"data_digest": "ef" * 32}, "samples changed"),
        ({"samples": 10**12}, "born with 10 samples, now 1000000000000"),
        ({"metrics": {"train_loss": float("nan")}}, r"not finite: \['train_loss'\]"),
    ],
)
def test_a_result_that_is_not_what_was_ordered_is_refused(change, text):
    with pytest.raises(AdmissionError, match=text):
        admit.header(replace(RESULT, **change), ORDER, "pi", 10, LIMITS)


def test_a_device_without_an_order_is_refused():
    with pytest.raises(AdmissionError, match="has no order"):
        admit.header(RESULT, None, "pi", 10, LIMITS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w": np.ones((3, 2), np.float32)}, r"'w': expected float32 \[2, 3\], got float32"),
        ({"w": np.ones((2, 3), np.int64)}, "got int64"),
        ({"w": np.full((2, 3), np.nan, np.float32)}, "'w' holds NaN"),
        ({"w": np.full((2, 3), 1e4, np.float32)}, "norm 2.45e"),
        ({"extra": np.ones(1, np.float32)}, r"\['extra'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, text):
    with pytest.raises(AdmissionError, match=text):
        admit.weights({**GOOD, **change}, SHAPES, 1.0)


def record(n=4, **change):
    arrays = {
        "features": np.arange(n * 6, dtype=np.float32).reshape(n, 2, 3),
        "logits": np.ones((n, 5), np.float32),
        "labels": np.arange(n).astype(np.uint16),
    }
    return {**arrays, **change}


def payload(tmp_path, *records):
    path = tmp_path / "payload"
    path.write_bytes(
        b"".join(tensors.pack([(n, a, "float32") for n, a in r.items()], seed=0) for r in records)
    )
    return path


def test_features_become_a_shard_in_sample_order(tmp_path):
    path = payload(tmp_path, record(4), record(1))
    shard = shelve(path, tmp_path / "shard", samples=5, shape=(2, 3), classes=5)
    assert len(shard) == 5
    np.testing.assert_array_equal(shard.features[:4], record(4)["features"])
    np.testing.assert_array_equal(shard.labels, [0, 1, 2, 3, 0])


@pytest.mark.parametrize(
    ("records", "samples", "text"),
    [
        ([record(4)], 5, "features of 4 samples, 5 were announced"),
        ([record(4), record(4)], 5, "at most 1 were announced"),
        ([record(features=np.ones((4, 3, 2), np.float32))], 4, r"expected float32 \[4, 2, 3\]"),
        ([record(logits=np.ones((4, 6), np.float32))], 4, r"logits: expected float32 \[4, 5\]"),
        ([record(labels=np.full(4, 5, np.uint16))], 4, "label 5 of 5 classes"),
        ([record(labels=np.arange(3).astype(np.uint16))], 4, "expected float32"),
        ([{"features": record()["features"]}], 4, "expected features, logits and labels"),
        ([], 4, "0 bytes cannot hold 4 samples"),
        ([record(4)], 10**15, "bytes cannot hold 1000000000000000 samples"),
    ],
)
def test_features_that_do_not_fit_are_refused_and_leave_nothing(tmp_path, records, samples, text):
    path = payload(tmp_path, *records)
    with pytest.raises(AdmissionError, match=text):
        shelve(path, tmp_path / "shard", samples=samples, shape=(2, 3), classes=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["payload"]


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (1, 4, 5)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(AdmissionError, match=r"logits: expected float32 \[n, 5\]"):
        admit.logits({"logits": np.ones(shape, np.float32)}, 5, 4)


def test_a_payload_cut_off_in_transit_is_refused(tmp_path):
    path = payload(tmp_path, record(4))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WireError, match="the file ends"):
        shelve(path, tmp_path / "shard", samples=4, shape=(2, 3), classes=5)


def test_features_by_another_codec_than_ordered_are_refused(tmp_path):
    path = payload(tmp_path, record(4))
    with pytest.raises(WireError, match=r"'features' was to come as relu\|q=4, not float32"):
        shelve(path, tmp_path / "s", samples=4, shape=(2, 3), classes=5, spec="relu|q=4")
    assert len(shelve(path, tmp_path / "s", samples=4, shape=(2, 3), classes=5, spec="float32"))
