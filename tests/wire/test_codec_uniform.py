"""The pipeline of Caldas et al.: every stage equals its dense definition, and has no bias."""

import math

import numpy as np
import pytest

from tests.wire.unbiased import assert_unbiased, draws_of_blocks, draws_of_rows, error
from wire import codecs, seeds
from wire.codecs import transforms
from wire.codecs.draws import Draws, strata_edges
from wire.codecs.packing import look_up, pack, packed_bytes, unpack
from wire.codecs.transforms import Hadamard, Identity, Kashin, hadamard, rotate

TRANSFORMS = [Identity(), Hadamard(), Kashin()]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sylvester(n):
    """H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]] / sqrt(2), by its closed form: (-1)^<i, j>."""
    return np.array([
        [(-1) ** (i & j).bit_count() / math.sqrt(n) for j in range(n)] for i in range(n)
    ])  # fmt: skip


def slow_signs(seed, n, part=0):
    """The signs, bit by bit from the stream's words."""
    words = seeds.raw(seed, 4 * part + 1, -(-n // 64))
    return np.array([1 - 2 * (int(words[i // 64]) >> i % 64 & 1) for i in range(n)])


@pytest.mark.parametrize("n", [1, 2, 4, 8, 32, 512])
def test_rotation_is_the_dense_hadamard_matrix_and_its_own_inverse(n):
    rows, dense = normal(3, n, seed=n), sylvester(n)
    np.testing.assert_allclose(hadamard(n), dense, atol=1e-6)
    np.testing.assert_allclose(rotate(rows), rows @ dense, atol=2e-5)
    np.testing.assert_allclose(rotate(rotate(rows)), rows, atol=2e-5)


def test_rotation_of_a_whole_block_keeps_lengths_and_undoes_itself():
    rows = normal(8, 4096)
    turned = rotate(rows)
    np.testing.assert_allclose(rotate(turned), rows, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-5
    )
    one_hot = np.zeros((1, 4096), np.float32)
    one_hot[0, 1234] = 64
    expected = [(-1) ** (1234 & i).bit_count() for i in range(4096)]
    np.testing.assert_array_equal(rotate(one_hot)[0], expected)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: type(t).__name__.lower())
@pytest.mark.parametrize("n", [1, 5, 8, 100, 1741, 3481])
def test_a_transform_is_undone_by_its_inverse(transform, n):
    blocks = normal(3, n, seed=n)
    coefficients = transform.forward(blocks, Draws(9, 0))
    assert coefficients.shape == (3, transform.width(n))
    assert coefficients.shape[1] % 8 == 0
    back = transform.inverse(coefficients, n, Draws(9, 0))
    np.testing.assert_allclose(back, blocks, atol=1e-5)


def test_hadamard_is_the_matrix_times_signs():
    x, signs = normal(1, 50), slow_signs(6, 64)
    expected = sylvester(64) @ (signs * np.pad(x[0], (0, 14)))
    np.testing.assert_allclose(Hadamard().forward(x, Draws(6, 0))[0], expected, atol=1e-5)


def test_kashin_is_the_iteration_in_a_dense_frame():
    n, width = 50, 64
    assert Kashin().width(n) == width
    x = normal(1, n)[0].astype(np.float64)
    places = sorted(seeds.raw(6, 0, width).argsort(kind="stable")[:n])
    frame = (sylvester(width) * slow_signs(6, width))[:, places]  # U, its columns orthonormal
    np.testing.assert_allclose(frame.T @ frame, np.eye(n), atol=1e-12)
    level, rest, expected = np.linalg.norm(x) / math.sqrt(width), frame @ x, np.zeros(width)
    for _ in range(2):
        clipped = np.clip(rest, -level, level)
        expected += clipped
        rest -= frame @ (frame.T @ clipped)
        level *= 0.9
    expected += rest
    np.testing.assert_allclose(frame.T @ expected, x, atol=1e-12)
    found = Kashin().forward(x[None].astype(np.float32), Draws(6, 0))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def peaks(transform, n, rows=64):
    """The mean over blocks of sqrt(D) max|y| / |x|."""
    x = normal(rows, n, seed=4)
    y = transform.forward(x, Draws(4, 0))
    return (np.abs(y).max(axis=1) * math.sqrt(y.shape[1]) / np.linalg.norm(x, axis=1)).mean()


def test_kashin_is_flatter_than_hadamard_and_padding_the_end_would_not_be(monkeypatch):
    plain = peaks(Hadamard(), 4096)
    assert peaks(Kashin(), 3481) < 0.9 * plain
    # The gain grows with redundancy, as in a tensor's tail, where half of the frame is redundant.
    assert Kashin().width(2048) == 4096
    assert peaks(Kashin(), 2048) < 0.72 * plain
    monkeypatch.setattr(Draws, "subset", lambda _self, n, _width: np.arange(n))
    assert peaks(Kashin(), 2048) > 0.92 * plain


@pytest.mark.parametrize(("width", "kept"), [(4096, 1024), (4096, 1229), (40, 7), (8, 1), (8, 8)])
def test_strata_hold_one_place_each_and_every_place_alike(width, kept):
    edges = strata_edges(width, kept)
    assert list(edges) == [i * width // kept for i in range(kept + 1)]
    places = Draws(3, 0).strata(4000, width, kept)
    assert places.shape == (4000, kept)
    assert (places >= edges[:-1]).all()
    assert (places < edges[1:]).all()
    shares = np.bincount(places.reshape(-1), minlength=width) / 4000
    expected = np.repeat(1 / np.diff(edges), np.diff(edges))
    deviation = np.sqrt(expected * (1 - expected) / 4000)
    assert np.abs(shares - expected).max() <= 6 * deviation.max() + 1e-12


def test_draws_are_the_bits_of_the_streams():
    words = seeds.raw(8, 4 + 2, 6)
    uniform = Draws(8, 1).uniform(2, 10)  # three words a row
    for row, column in np.ndindex(2, 10):
        number = int(words[3 * row + column // 4]) >> 16 * (column % 4) & 0xFFFF
        assert uniform[row, column] == np.float32((number + 0.5) / 65536)
    np.testing.assert_array_equal(Draws(8, 1).signs(1, 128)[0], slow_signs(8, 128, part=1))
    words = seeds.raw(8, 3, 4)
    places = Draws(8, 0).strata(2, 100, 3)  # strata 0..32, 33..65, 66..99; two words a row
    for row, i in np.ndindex(2, 3):
        number = int(words[2 * row + i // 2]) >> 32 * (i % 2) & 0xFFFFFFFF
        assert places[row, i] == (0, 33, 66)[i] + (number * (33, 33, 34)[i] >> 32)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 8, 13, 4096])
def test_packing_is_the_little_endian_number_of_eight_levels(bits, n):
    levels = np.random.default_rng(n).integers(0, 2**bits, (3, n)).astype(np.uint8)
    packed = pack(levels, bits)
    assert packed.shape == (3, packed_bytes(n, bits))
    for row, expected in zip(packed, levels, strict=True):
        number = int.from_bytes(row.tobytes(), "little")
        assert [number >> i * bits & (2**bits - 1) for i in range(n)] == list(expected)
    np.testing.assert_array_equal(unpack(packed, bits, n), levels)
    values = normal(2**bits)
    np.testing.assert_array_equal(look_up(packed, bits, n, values), values[levels])


@pytest.mark.parametrize(
    ("spec", "transform", "rate"),
    [
        ("identity|q=3", Identity(), 1.0), ("hadamard|q=4", Hadamard(), 1.0),
        ("hadamard|s=0.3|q=2", Hadamard(), 0.3), ("kashin|s=0.5|q=4", Kashin(), 0.5),
    ],
)  # fmt: skip
def test_a_block_is_its_slow_reference(spec, transform, rate):
    """Compared coefficient by coefficient, in float64, with a body that is decoded by hand."""
    seed, n, bits = 21, 100, int(spec[-1])
    values = normal(n, seed=1)
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=seed, name="x")
    width = transform.width(n)  # a tail, which uses part 1 of the random numbers
    y = transform.forward(values[None], Draws(seed, 1))[0].astype(np.float64)
    kept = max(1, round(rate * width))
    places = Draws(seed, 1).strata(1, width, kept)[0] if rate < 1 else np.arange(width)
    uniform = Draws(seed, 1).uniform(1, kept)[0]
    low, step = np.frombuffer(body[:8], "<f4").astype(np.float64)
    assert low == pytest.approx(y[places].min(), rel=1e-5)
    assert step == pytest.approx(np.ptp(y[places]) / (2**bits - 1), rel=1e-5)
    number = int.from_bytes(body[8:], "little")
    decoded = np.zeros(width)
    for i, place in enumerate(places):
        level = number >> i * bits & (2**bits - 1)
        exact = (y[place] - low) / step + uniform[i]
        assert level == min(math.floor(exact), 2**bits - 1) or abs(exact - round(exact)) < 1e-4
        wide = (i + 1) * width // kept - i * width // kept
        decoded[place] = (low + level * step) * wide
    expected = transform.inverse(decoded[None].astype(np.float32), n, Draws(seed, 1))[0]
    np.testing.assert_allclose(
        codec.decode(body, n, seed=seed, name="x"), expected, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    "spec",
    ["identity|q=2", "identity|s=0.3|q=4", "hadamard|q=1", "hadamard|q=3", "hadamard|s=0.25|q=1",
     "kashin|q=2", "kashin|s=0.6|q=4"],
)  # fmt: skip
@pytest.mark.parametrize("n", [9, 300])
def test_the_mean_of_many_draws_is_the_value(spec, n):
    values = normal(n) * np.linspace(0.1, 3, n, dtype=np.float32)
    assert_unbiased(draws_of_rows(spec, values, 20_000), values)


@pytest.mark.parametrize("spec", ["hadamard|q=2", "hadamard|s=0.3|q=2", "kashin|q=2"])
def test_the_mean_of_many_whole_blocks_is_the_value(spec):
    block = np.random.default_rng(1).lognormal(size=codecs.parse(spec).coder.block)
    assert_unbiased(draws_of_blocks(spec, block.astype(np.float32), 1000), block)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_error_of_a_value_is_below_one_step_and_its_variance_a_quarter(bits):
    values = np.random.default_rng(bits).uniform(-3, 5, 4096).astype(np.float32)
    draws = draws_of_blocks(f"identity|q={bits}", values, 200)
    step = np.ptp(values) / (2**bits - 1)
    assert np.abs(draws - values).max() <= step * 1.0001
    # Fractions of uniform values are uniform, so the mean variance of rounding is step^2 / 6.
    assert np.square(draws - values).mean() == pytest.approx(step**2 / 6, rel=0.05)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_highest_value_rounds_up_to_the_highest_level_and_not_over_it(bits, monkeypatch):
    """A float32 step may be a little too small, so that the maximum lies above the top level."""
    almost = np.float32(65535.5 / 65536)
    monkeypatch.setattr(Draws, "uniform", lambda _self, rows, n: np.full((rows, n), almost))
    for span in np.random.default_rng(0).uniform(0.1, 9, 300).astype(np.float32):
        values = np.array([0, span] * 4, np.float32)
        codec = codecs.parse(f"identity|q={bits}")
        decoded = codec.decode(codec.encode(values, seed=0, name="x"), 8, seed=0, name="x")
        np.testing.assert_allclose(decoded, values, atol=1.001 * span / (2**bits - 1))
        np.testing.assert_allclose(decoded[1::2], span, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.1])
def test_subsampling_adds_one_over_s_less_one(rate):
    found, _ = error(f"hadamard|s={rate}|q=8", normal(1 << 18))
    assert found == pytest.approx(1 / rate - 1, rel=0.03)


def test_rotation_lowers_the_error_of_a_spiky_vector():
    values = normal(4096) * np.float32(0.1)
    values[5] = 100.0
    assert error("hadamard|q=2", values)[0] < error("identity|q=2", values)[0] / 10


@pytest.mark.parametrize(("bits", "pays"), [(1, True), (2, True), (3, False), (4, False)])
def test_kashin_pays_for_its_bits_up_to_two(bits, pays):
    """Kashin has a third less error at q bits a coefficient, but 18 % more coefficients.

    It is compared with blocks at q and q + 1 bits, mixed so that both take the same bytes.
    """
    values = normal(1 << 18)
    plain, few = error(f"hadamard|q={bits}", values)
    finer, most = error(f"hadamard|q={bits + 1}", values)
    flat, total = error(f"kashin|q={bits}", values)
    assert flat < 0.7 * plain
    assert total == pytest.approx(few * 4096 / 3481, rel=0.01)
    share = (total - few) / (most - few)
    assert (flat < share * finer + (1 - share) * plain) == pays


def test_transforms_say_which_blocks_they_take():
    assert [t.block for t in TRANSFORMS] == [4096, 4096, 3481]
    assert [t.width(t.block) for t in TRANSFORMS] == [transforms.BLOCK] * 3
