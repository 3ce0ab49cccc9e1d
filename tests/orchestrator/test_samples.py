"""Samples of all devices: drawn as they were sent, whatever codec and order."""

import numpy as np
import pytest
import torch

from orchestrator.samples import Samples
from orchestrator.shards import Shard, shelve
from wire import frames, tensors

SHAPE, CLASSES = (4, 32, 32), 5


def sent(tmp_path, name: str, n: int, spec: str, shape=SHAPE) -> tuple[Shard, dict]:
    """A device's shard, and all its samples as the codec leaves them."""
    rng = np.random.default_rng(len(name) + n)
    record = {
        "features": np.maximum(rng.standard_normal((n, *shape)), 0).astype(np.float32),
        "logits": rng.standard_normal((n, CLASSES)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, n).astype(np.uint16),
    }
    specs = {"features": spec, "logits": "float32", "labels": "raw"}
    packed = []
    for at in range(0, n, 3):  # a record for each batch of the device's
        named = [(key, array[at : at + 3], specs[key]) for key, array in record.items()]
        packed.append(tensors.pack(named, seed=at))
    path = tmp_path / name
    path.write_bytes(b"".join(packed))
    sizes = {"samples": n, "shape": shape, "classes": CLASSES}
    shard = shelve(path, tmp_path / f"shard-{name}", spec=spec, **sizes)
    decoded = [tensors.unpack(frames.decode(data), where=name) for data in packed]
    return shard, {key: np.concatenate([each[key] for each in decoded]) for key in record}


@pytest.mark.parametrize(
    ("spec", "shape", "quantized"),
    [
        ("relu|q=4|zstd", SHAPE, True),
        ("relu|q=1", SHAPE, True),
        ("identity|q=8", SHAPE, True),
        ("identity|q=3|zstd", SHAPE, True),
        ("identity|s=0.5|q=8", SHAPE, False),
        ("hadamard|q=4", SHAPE, False),
        ("float32", SHAPE, False),
        ("relu|q=4", (3, 10, 10), False),  # blocks of 1,024 values straddle samples of 300
    ],
)
def test_batches_are_what_the_devices_sent(tmp_path, spec, shape, quantized):
    given = [sent(tmp_path, name, n, spec, shape) for name, n in (("a", 7), ("bb", 1), ("ccc", 4))]
    shards, wanted = [shard for shard, _ in given], [each for _, each in given]
    assert all(shard.features.dtype == (np.uint8 if quantized else np.float32) for shard in shards)
    samples = Samples(shards, torch.device("cpu"))
    assert len(samples) == 12
    assert samples.spans == [range(7), range(7, 8), range(8, 12)]
    whole = {key: np.concatenate([each[key] for each in wanted]) for key in wanted[0]}
    for chosen in (np.arange(12), np.array([11, 0, 7, 3, 3, 8]), np.array([5])):
        batch = samples.draw(chosen)
        np.testing.assert_allclose(batch.features, whole["features"][chosen], rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(batch.logits, whole["logits"][chosen])
        np.testing.assert_array_equal(batch.labels, whole["labels"][chosen])
        assert batch.labels.dtype == torch.int64
        assert batch.features.is_contiguous(memory_format=torch.channels_last)
