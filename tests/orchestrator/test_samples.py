"""Samples of all devices are drawn exactly as they were sent, whatever the codec and the order."""

import numpy as np
import pytest
import torch

import models
from ondevice import views
from ondevice.views import PAD
from orchestrator.config import DeviceConfig, RunConfig
from orchestrator.strategies.gkt import extractors
from orchestrator.training import distill
from orchestrator.training.samples import Samples, Source
from orchestrator.training.shards import Shard, shelve
from wire import frames, seeds, tensors

SHAPE, CLASSES = (4, 32, 32), 5


def sent(tmp_path, name: str, n: int, spec: str, shape=SHAPE) -> tuple[Shard, dict]:
    """A device's shard, and all its samples as the codec decodes them."""
    rng = np.random.default_rng(len(name) + n)
    record = {
        "features": np.maximum(rng.standard_normal((n, *shape)), 0).astype(np.float32),
        "logits": rng.standard_normal((n, CLASSES)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, n).astype(np.uint16),
    }
    specs = {"features": spec, "logits": "float32", "labels": "raw"}
    packed = []
    for at in range(0, n, 3):  # the device sends a record for each batch
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
    samples = Samples([*map(Source, shards)], torch.device("cpu"))
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


def test_a_crop_of_feature_maps_is_the_feature_map_of_the_crop():
    """The borders of image and crop, one pixel wide, may differ because the device pads there."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 256, (9, 16, 16, 3), np.uint8)
    net = models.build("resnet8", classes=3, input_shape=(3, 16, 16)).eval()

    @torch.no_grad()
    def extract(shown):
        x = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255
        return net.extractor(x).numpy()

    rows = np.concatenate([extract(pixels), extract(pixels[:, :, ::-1].copy())])
    shard = Shard(rows, np.arange(54, dtype=np.float32).reshape(18, 3), np.arange(18) % 9)
    fill = extract(np.zeros((1, 16, 16, 3), np.uint8))[0, :, 8, 8]
    other = Shard(rows[:4], np.zeros((4, 3), np.float32), np.zeros(4, np.int64))
    samples = Samples([Source(other), Source(shard, 0.5, fill)], torch.device("cpu"))
    assert samples.spans == [range(4), range(4, 13)]
    looks = views.looks(123, 9)
    assert 0 < looks.flips.sum() < 9
    batch = samples.draw(np.arange(4, 13), looks)
    wanted = extract(views.look(pixels, looks))
    same = np.isclose(batch.features.numpy(), wanted, atol=1e-5).all(axis=1)
    for n, (row, column) in enumerate(zip(looks.rows - PAD, looks.columns - PAD, strict=True)):
        # Inside the crop, and two pixels around where the image ends in it.
        borders = np.zeros((16, 16), bool)
        borders[[0, -1]] = borders[:, [0, -1]] = True
        for axis, start in ((0, row), (1, -column if looks.flips[n] else column)):
            for edge in (-start - 1, -start, 16 - start - 1, 16 - start):
                if 0 <= edge < 16:
                    borders.swapaxes(0, axis)[edge] = True
        assert same[n][~borders].all()
        assert (~borders).sum() >= 9 * 9
    assert np.array_equal(batch.logits, shard.logits[np.arange(9) + 9 * looks.flips])
    assert batch.weights.tolist() == [0.5] * 9
    plain = samples.draw(np.array([2, 5]))
    assert np.array_equal(plain.features, rows[[2, 1]])
    assert plain.weights.tolist() == [1.0, 0.5]
    # Samples with feature maps of only one view stay as they are, whatever the look.
    assert np.array_equal(samples.draw(np.arange(4), looks.of(np.arange(4))).features, rows[:4])


@pytest.mark.parametrize("sends_mirrored", [True, False])
def test_a_small_crop_is_a_part_of_the_padded_map(sends_mirrored):
    rng = np.random.default_rng(1)
    maps = rng.standard_normal((5, 3, 16, 12)).astype(np.float32)
    rows = np.concatenate([maps, maps[..., ::-1]]) if sends_mirrored else maps
    shard = Shard(rows, np.zeros((len(rows), 3), np.float32), np.arange(len(rows)) % 3)
    fill = np.array([1.0, 2.0, 3.0], np.float32)
    mirror = None if sends_mirrored else np.arange(3)
    samples = Samples([Source(shard, fill=fill, mirror=mirror)], torch.device("cpu"))
    assert samples.crops_all
    assert not Samples([Source(shard)], torch.device("cpu")).crops_all
    padded = np.tile(fill[:, None, None], (5, 1, 24, 20))
    padded[:, :, PAD:-PAD, PAD:-PAD] = maps
    size = distill.small(samples.shape)
    assert size == (12, 9)
    looks = views.drawn(seeds.raw(3, 0, 15), 2, (4, 3))
    assert looks.rows.max() > 2 * PAD - 2
    assert 0 < looks.flips.sum() < 5
    drawn = samples.draw(np.arange(5), looks, size).features.numpy()
    for n, (row, column, flip) in enumerate(zip(*looks, strict=True)):
        part = padded[n, :, row : row + 12, column : column + 9]
        np.testing.assert_array_equal(drawn[n], part[..., ::-1] if flip else part)


def test_the_map_of_a_mirrored_image_is_made_of_the_plain_map():
    """A stem of filters that come with their mirror images: one row a sample is enough."""
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((6, 3, 16, 16)).astype(np.float32))
    torch.manual_seed(0)
    net = models.build("resnet8-opponent", classes=3, input_shape=(3, 16, 16)).eval()
    config = RunConfig("run", device=DeviceConfig(classes=3, input=(3, 16, 16)))
    learnt = models.build("resnet8", classes=3, input_shape=(3, 16, 16))
    of = {name: distill.weights(each.extractor) for name, each in (("a", net), ("b", learnt))}
    mirror = extractors.mirror(config, "resnet8-opponent", of["a"])
    assert sorted(mirror) == list(range(16))
    assert mirror != tuple(range(16))
    assert extractors.mirror(config, "resnet8", of["b"]) is None
    with torch.no_grad():
        rows, mirrored = net.extractor(x).numpy(), net.extractor(x.flip(3)).numpy()
    shard = Shard(rows, np.zeros((6, 3), np.float32), np.arange(6) % 3)
    source = Source(shard, fill=rows[0, :, 0, 0], mirror=np.array(mirror))
    assert len(source) == 6
    samples, middle = Samples([source], torch.device("cpu")), np.full(6, PAD)
    flips = np.array([True, False, True, True, False, False])
    drawn = samples.draw(np.arange(6), views.Looks(middle, middle, flips)).features.numpy()
    np.testing.assert_allclose(drawn[flips], mirrored[flips], atol=1e-5)
    np.testing.assert_array_equal(drawn[~flips], rows[~flips])
    # A crop of a mirrored image is the mirror image of a crop: two pixels further left, and back.
    looks = views.Looks(middle + 1, middle + 2, flips)
    moved = samples.draw(np.arange(6), looks).features.numpy()
    np.testing.assert_array_equal(moved[1, :, :-1, :-2], rows[1, :, 1:, 2:])
    np.testing.assert_allclose(moved[0, :, :-1, 2:], mirrored[0, :, 1:, :-2], atol=1e-5)
