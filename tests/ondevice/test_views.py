"""Batches, views and held-out samples: the same from the same seed, for ever."""

import numpy as np
import pytest

from ondevice import views
from ondevice.images import ImageSet


def make(n, shape=(8, 6, 3), classes=4):
    x = np.random.RandomState(n).randint(0, 256, (n, *shape)).astype(np.uint8)
    return ImageSet(x, np.arange(n) % classes, "digest")


@pytest.mark.parametrize("augment", [False, True])
def test_epoch_shows_each_sample_once(augment):
    indices = [i for i, _ in views.epoch(make(24), batch=8, seed=5, augment=augment)]
    assert len(indices) == 3
    assert sorted(np.concatenate(indices)) == list(range(24))


def test_epoch_without_augmentation_gives_the_samples_at_its_indices():
    images = make(24)
    for indices, pixels in views.epoch(images, batch=8, seed=5, augment=False):
        assert indices.dtype == np.int64
        assert np.array_equal(pixels, images.x[indices])


@pytest.mark.parametrize(("n", "batch", "count"), [(10, 4, 3), (3, 8, 1), (1, 4, 1), (8, 8, 1)])
def test_last_batch_is_filled_from_the_head_of_the_permutation(n, batch, count):
    got = [i for i, _ in views.epoch(make(n), batch=batch, seed=1, augment=False)]
    assert [len(i) for i in got] == [batch] * count
    flat = np.concatenate(got)
    assert sorted(flat[:n]) == list(range(n))
    assert np.array_equal(flat, np.resize(flat[:n], count * batch))


def test_a_seed_gives_the_same_bytes_for_ever():
    """Golden bytes: if the stream changed, resumed rounds would differ between agent versions."""
    images = make(10)
    got = list(views.epoch(images, batch=4, seed=7, augment=True))
    assert [i.tolist() for i, _ in got] == [[3, 0, 8, 4], [1, 9, 5, 7], [2, 6, 3, 0]]
    assert [int(p.astype(np.int64).sum()) for _, p in got] == [33629, 28725, 28338]


def test_other_seeds_give_other_orders_and_crops():
    runs = [list(views.epoch(make(32), batch=32, seed=s, augment=True)) for s in range(5)]
    assert len({run[0][0].tobytes() for run in runs}) == 5
    assert len({run[0][1].tobytes() for run in runs}) == 5


def test_augmentation_is_the_dense_definition():
    """Zero-padded, cropped at (row, column), flipped if a number in the last third is odd."""
    images = make(16, shape=(8, 6, 3))
    raw = np.random.Philox(key=3).random_raw(48)
    got = views.look(images.x, views.drawn(raw))
    seen = set()
    for n in range(16):
        row, column, flip = int(raw[n] % 9), int(raw[16 + n] % 9), int(raw[32 + n] & 1)
        seen.add((row, column, flip))
        for i in range(8):
            for j in range(6):
                at_i, at_j = row + i - 4, column + (5 - j if flip else j) - 4
                inside = 0 <= at_i < 8 and 0 <= at_j < 6
                expected = images.x[n, at_i, at_j] if inside else np.zeros(3)
                assert np.array_equal(got[n, i, j], expected), (n, i, j)
    assert len({flip for *_, flip in seen}) == 2


def test_crops_and_flips_are_spread_evenly():
    marks = np.zeros((1, 9, 9, 1), np.uint8)
    marks[0, 4, 3] = 255  # off centre: its place in the crop reveals offset and flip
    images = ImageSet(marks.repeat(6480, 0), np.zeros(6480, np.int64), "digest")
    (_, pixels) = next(views.epoch(images, batch=6480, seed=0, augment=True))
    where = np.argwhere(pixels[..., 0])
    counts = np.bincount(where[:, 1], minlength=9)
    assert np.abs(counts - 720).max() < 5 * 27  # sqrt(720) = 27
    assert len(where) > 6480 * 0.85


def test_training_does_not_change_the_samples():
    images = make(8)
    before = images.x.copy()
    list(views.epoch(images, batch=4, seed=0, augment=True))
    assert np.array_equal(images.x, before)


@pytest.mark.parametrize(("n", "batch", "valid"), [(8, 4, [4, 4]), (10, 4, [4, 4, 2]), (3, 8, [3])])
def test_evaluation_goes_through_the_samples_in_order(n, batch, valid):
    images = make(n)
    got = list(views.batches(images, batch))
    assert [v for *_, v in got] == valid
    assert np.concatenate([i[:v] for i, _, v in got]).tolist() == list(range(n))
    for indices, pixels, _ in got:
        assert len(indices) == batch
        assert np.array_equal(pixels, images.x[indices])


@pytest.mark.parametrize("view", [views.PLAIN, views.MIRRORED, 77])
def test_a_view_shows_each_sample_the_same_wherever_it_comes(view):
    images = make(10, shape=(8, 6, 3))
    whole = views.look(images.x, views.looks(view, 10))
    if view == views.PLAIN:
        assert np.array_equal(whole, images.x)
    elif view == views.MIRRORED:
        assert np.array_equal(whole, images.x[:, :, ::-1])
    else:
        assert not np.array_equal(whole, views.look(images.x, views.looks(78, 10)))
    for indices, pixels in views.epoch(images, batch=4, seed=3, augment=False, view=view):
        assert np.array_equal(pixels, whole[indices])
    got = np.concatenate([pixels[:valid] for _, pixels, valid in views.batches(images, 4, view)])
    assert np.array_equal(got, whole)


def test_augmentation_is_of_no_effect_beside_a_view():
    images = make(8)
    for (_, one), (_, other) in zip(
        views.epoch(images, batch=4, seed=3, augment=True, view=9),
        views.epoch(images, batch=4, seed=3, augment=False, view=9),
        strict=True,
    ):
        assert np.array_equal(one, other)


def test_held_out_samples_are_the_same_for_the_same_data_and_never_trained_on():
    images = ImageSet(make(40).x, make(40).y, "ab" * 32)
    mask = views.held_out(images.digest, 40, 0.25)
    assert mask.sum() == 10
    assert np.array_equal(mask, views.held_out(images.digest, 40, 0.25))
    assert not np.array_equal(mask, views.held_out("cd" * 32, 40, 0.25))
    assert not views.held_out(images.digest, 40, 0.0).any()
    assert views.held_out(images.digest, 1, 0.9).sum() == 0
    seen = [i for i, _ in views.epoch(images, batch=8, seed=1, augment=False, view=5, holdout=0.25)]
    assert len(seen) == views.steps(30, 8) == 4
    assert set(np.concatenate(seen)) == set(np.flatnonzero(~mask))
