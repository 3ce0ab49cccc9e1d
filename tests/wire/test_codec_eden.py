"""EDEN: its formulas, its published errors, and no bias where a single rotation is biased."""

import math

import numpy as np
import pytest

from tests.wire.unbiased import assert_unbiased, draws_of_blocks, draws_of_rows, error
from wire import codecs
from wire.codecs.draws import Draws
from wire.codecs.eden import Eden
from wire.codecs.lloyd_max import levels, nearest
from wire.codecs.transforms import hadamard

NORMAL = np.random.default_rng(5).standard_normal(1 << 17).astype(np.float32)
# E(z - c)^2 with the best 2^b levels for N(0, 1): Max 1960, table 1, and its continuation.
DISTORTION = {
    1: 0.36338, 2: 0.11748, 3: 0.034548, 4: 0.0095010,
    5: 0.0025047, 6: 0.00064424, 7: 0.00016348, 8: 0.000041185,
}  # fmt: skip


@pytest.mark.parametrize("bits", DISTORTION)
def test_levels_are_those_of_lloyd_and_max(bits):
    c = levels(bits).astype(np.float64)
    np.testing.assert_allclose(c, -c[::-1], atol=1e-7)
    edges = np.concatenate(([-12], (c[1:] + c[:-1]) / 2, [12]))
    z = np.linspace(-12, 12, 2_400_001)
    weight = np.exp(-np.square(z) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    cell = np.searchsorted(edges[1:-1], z)
    assert (np.square(z - c[cell]) * weight).sum() == pytest.approx(DISTORTION[bits], rel=5e-4)
    if bits <= 4:  # each level is the mean of its cell
        means = np.bincount(cell, z * weight) / np.bincount(cell, weight)
        np.testing.assert_allclose(c, means, atol=1e-4)


def test_levels_of_one_and_two_bits_are_the_known_ones():
    np.testing.assert_allclose(levels(1), [-math.sqrt(2 / math.pi), math.sqrt(2 / math.pi)])
    np.testing.assert_allclose(levels(2), [-1.51042, -0.45278, 0.45278, 1.51042], atol=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_nearest_level_is_the_nearest(bits):
    z = np.concatenate((NORMAL[:20_000], [-9, 9, 0, -100, 100])).astype(np.float32)
    found = np.abs(z - levels(bits)[nearest(z, bits)])
    best = np.abs(z[:, None] - levels(bits)).min(axis=1)
    np.testing.assert_allclose(found, best, atol=0 if bits <= 4 else 1e-3)


def rotated(values, seed, *, times):
    """A tail's padded x, and the dense matrix R with y = R x."""
    width = max(64, 1 << (len(values) - 1).bit_length())
    signs = Draws(seed, 1).signs(1, times * width).reshape(times, width)
    matrix = np.eye(width)
    for row in signs:
        matrix = hadamard(width).astype(np.float64) @ (row[:, None] * matrix)
    return np.pad(values, (0, width - len(values))).astype(np.float64), matrix


@pytest.mark.parametrize("bits", [0.5, 1, 1.5, 2, 3.25, 4])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize("n", [40, 500, 1000])
def test_a_block_is_its_dense_reference(bits, mse, n):
    """Compared level by level, with the rotation's matrix and the paper's scale."""
    codec = Eden(bits, mse)
    x, matrix = rotated(NORMAL[:n], 3, times=3 if n <= 512 else 1 if mse else 2)
    y = matrix @ x
    z = y * math.sqrt(len(y)) / np.linalg.norm(y)
    c = np.zeros(len(y))
    if bits < 1:
        kept = Draws(3, 1).strata(1, len(y), round(bits * len(y)))[0]
        c[kept] = np.sign(z[kept]) * math.sqrt(2 / math.pi)
    else:
        finer = round((bits - int(bits)) * len(y) / 8) * 8
        for i, value in enumerate(z):
            table = levels(int(bits) + (i < finer))
            c[i] = table[np.abs(table - value).argmin()]
    scale = (c @ y) / (c @ c) if mse else (y @ y) / (c @ y)
    found = codecs.Codec(codec, compressed=False)
    body = found.encode(NORMAL[:n], seed=3, name="x")
    assert np.frombuffer(body[:4], "<f4")[0] == pytest.approx(scale, rel=1e-3)
    decoded = found.decode(body, n, seed=3, name="x")
    missed = decoded - (matrix.T @ (scale * c))[:n]
    assert np.square(missed).sum() < 1e-4 * np.square(x).sum()  # one or two values on a border


def test_one_bit_is_drive():
    """S sign(R x), S = |x|^2 / |R x|_1."""
    assert codecs.parse("drive") == codecs.parse("eden|b=1")
    assert codecs.parse("drive|mse") == codecs.parse("eden|b=1|mse")
    x, matrix = rotated(NORMAL[:1000], 0, times=2)
    y = matrix @ x
    expected = matrix.T @ (np.sign(y) * (x @ x) / np.abs(y).sum())
    codec = codecs.parse("drive")
    body = codec.encode(NORMAL[:1000], seed=0, name="x")
    np.testing.assert_allclose(
        codec.decode(body, 1000, seed=0, name="x"), expected[:1000], atol=1e-4
    )


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ("eden|b=1", 0.571), ("eden|b=2", 0.133), ("eden|b=3", 0.0358), ("eden|b=4", 0.00959),
        ("eden|b=1|mse", 0.363), ("eden|b=2|mse", 0.1175), ("eden|b=3|mse", 0.0345),
        ("eden|b=4|mse", 0.0095),
        *((f"eden|b={b}|mse", DISTORTION[b]) for b in (5, 6, 7, 8)),
        # cos^2 = 1 - d: at 0.5 bits half of the coordinates have one bit; at 1.5 bits half have one
        # and half have two; and so on.
        ("eden|b=0.5", math.pi - 1), ("eden|b=0.5|mse", 1 - 1 / math.pi),
        ("eden|b=0.1", 5 * math.pi - 1), ("eden|b=0.1|mse", 1 - 0.2 / math.pi),
        ("eden|b=1.5|mse", (0.36338 + 0.11748) / 2), ("eden|b=2.25", 1 / (1 - 0.096747) - 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("values", ["normal", "log-normal"])
def test_the_error_is_the_papers_limit(spec, limit, values):
    """The error is within 3 % for any values, thanks to the rotation."""
    given = NORMAL if values == "normal" else np.sign(NORMAL) * np.exp(np.roll(NORMAL, 1))
    found, bits = error(spec, given)
    assert found == pytest.approx(limit, rel=0.03)
    assert bits == pytest.approx(float(spec.split("=")[1].split("|")[0]) + 32 / 4096, abs=2e-3)


@pytest.mark.parametrize("other", ["hadamard|q=2", "kashin|q=2"])
def test_two_bits_leave_a_quarter_of_the_error_of_uniform_levels_or_less(other):
    """Kashin's codec takes 2.37 bits a value for its two bits a coefficient, more than EDEN."""
    ours, bits = error("eden|b=2", NORMAL)
    theirs, more = error(other, NORMAL)
    assert ours < theirs / 4
    assert bits < more


SKEWED = {
    "normal": NORMAL[:300],
    "log-normal": np.sign(NORMAL[:300]) * np.exp(NORMAL[300:600]),
    "sparse": np.where(np.arange(300) % 40 == 7, NORMAL[:300], 0),
}


@pytest.mark.parametrize("spec", ["eden|b=0.3", "drive", "eden|b=1.5", "eden|b=2", "eden|b=4"])
@pytest.mark.parametrize("kind", SKEWED)
def test_the_mean_of_many_draws_is_the_value(spec, kind):
    values = SKEWED[kind].astype(np.float32)
    assert_unbiased(draws_of_rows(spec, values, 8_000), values)


@pytest.mark.parametrize("spec", ["eden|b=0.5", "drive", "eden|b=2.5"])
def test_the_mean_of_many_whole_blocks_is_the_value(spec):
    block = np.zeros(4096, np.float32)
    block[:3] = 4, 2, 1  # the worst case of a single rotation
    block[100:140] = NORMAL[:40]
    assert_unbiased(draws_of_blocks(spec, block, 1000), block)


def test_one_rotation_would_be_biased(monkeypatch):
    """For (2, 1, 0, ...) a single rotation gives (2.5, 0, ...), whatever the seed."""
    monkeypatch.setattr(
        Eden, "_signs", lambda _self, rows, width, draws: [draws.signs(rows, width)]
    )
    draws = draws_of_rows("drive", np.float32([2, 1] + [0] * 62), 60)
    np.testing.assert_allclose(draws.mean(axis=0), [2.5] + [0] * 63, atol=1e-5)


@pytest.mark.parametrize("spec", ["eden|b=0.5", "drive", "eden|b=4", "eden|b=8"])
@pytest.mark.parametrize("value", [3.25, -1e-35, 2.0**100])
def test_a_single_value_is_exact_for_its_length_is_kept(spec, value):
    draws = draws_of_rows(spec, np.float32([value]), 20)
    np.testing.assert_allclose(draws, np.full((20, 1), np.float32(value)), rtol=1e-5)


def test_a_block_of_which_no_kept_coordinate_tells_anything_is_zero_and_not_infinite():
    """The rotation of (1, 1, 0, ...) is zero at half of its 64 coordinates; three are kept."""
    draws = draws_of_rows("eden|b=0.05", np.float32([1, 1]), 4000)
    assert (draws == 0).all(axis=1).any()
    assert np.abs(draws).max() < 1e3


def test_the_scale_keeps_the_length_along_x_or_leaves_nothing_along_what_is_sent():
    x = NORMAL[:4096].astype(np.float64)
    for seed in range(5):
        for bits in (0.5, 1, 2, 3.5):
            decoded = {}
            for mse in (False, True):
                codec = codecs.Codec(Eden(bits, mse), compressed=False)
                body = codec.encode(NORMAL[:4096], seed=seed, name="x")
                decoded[mse] = codec.decode(body, 4096, seed=seed, name="x").astype(np.float64)
            assert decoded[False] @ x == pytest.approx(x @ x, rel=1e-4)
            assert decoded[True] @ (x - decoded[True]) == pytest.approx(0, abs=1e-3 * (x @ x))
