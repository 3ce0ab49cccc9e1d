"""Index sets: a fixed number of units, drawn fairly, named by a digest; cut and paste by them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.submodel import layout as layout_of
from models.units import Layout, all_places, choose, cut, digest, kept_widths, paste
from tests.models.networks import SMALL, make, weights
from wire.errors import StillhouseError


def draws(how, *, rounds=(1,), device="a", seed=1, groups=("g",), n=16, keep_rate=0.375):
    layout = Layout(dict.fromkeys(groups, n), {}, {})
    return [choose(layout, keep_rate, how, seed=seed, round_=r, device=device) for r in rounds]


@given(
    widths=st.lists(st.integers(2, 40), min_size=1, max_size=4),
    keep_rate=st.floats(1e-3, 1),
    how=st.sampled_from(["random", "shared", "ordered", "rolling"]),
    round_=st.integers(0, 10**6),
)
def test_a_fixed_number_is_kept_without_replacement(widths, keep_rate, how, round_):
    layout = Layout({f"g{i}": n for i, n in enumerate(widths)}, {}, {})
    units = choose(layout, keep_rate, how, seed=3, round_=round_, device="pi")
    assert list(units) == list(layout.groups)
    for group, n in layout.groups.items():
        chosen = units[group]
        assert len(chosen) == max(1, round(keep_rate * n)) == kept_widths(layout, keep_rate)[group]
        assert chosen.dtype == np.int64
        assert (np.diff(chosen) > 0).all()
        assert 0 <= chosen[0] <= chosen[-1] < n


@pytest.mark.parametrize("how", ["random", "shared"])
def test_draws_are_uniform_over_units_and_over_pairs(how):
    rounds, n, k = 3000, 16, 6
    marks = np.zeros((rounds, n))
    for row, units in zip(marks, draws(how, rounds=range(rounds)), strict=True):
        row[units["g"]] = 1
    # A unit's count has variance R p (1 - p); counts sum to R k, so that the sum of their squared
    # deviations over (n / (n - 1)) R p (1 - p) is chi-square with 15 degrees of freedom, whose
    # 99.9 % quantile is 37.7.
    p = k / n
    squares = np.square(marks.sum(0) - rounds * p).sum()
    assert squares / (rounds * p * (1 - p)) * (n - 1) / n < 37.7
    pair = k * (k - 1) / (n * (n - 1))
    together = (marks.T @ marks)[np.triu_indices(n, 1)] / rounds
    assert np.abs(together - pair).max() < 5 * math.sqrt(pair * (1 - pair) / rounds)


def test_random_draw_differs_by_device_round_seed_and_group():
    def name(*, round_=1, **settings):
        return digest(draws("random", rounds=[round_], **settings)[0])

    assert name() == name()
    assert len({name(), name(device="b"), name(round_=2), name(seed=2)}) == 4
    assert name(seed=1, round_=11) != name(seed=11, round_=1)
    both = draws("random", groups=("g", "h"))[0]
    assert not np.array_equal(both["g"], both["h"])


def test_random_draw_is_the_same_on_every_machine_and_version():
    assert draws("random")[0]["g"].tolist() == [0, 8, 9, 10, 12, 13]
    assert draws("shared")[0]["g"].tolist() == [1, 2, 6, 8, 11, 13]


def test_shared_draw_is_the_same_for_all_devices_of_a_round():
    a, b = ([digest(u) for u in draws("shared", rounds=[1, 2], device=name)] for name in "ab")
    assert a == b
    assert a[0] != a[1]


@given(low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_ordered_sets_are_nested(low, high):
    low, high = sorted((low, high))
    small, large = (draws("ordered", keep_rate=p)[0]["g"] for p in (low, high))
    np.testing.assert_array_equal(small, np.arange(len(small)))
    assert set(small) <= set(large)


@pytest.mark.parametrize("first", [0, 5, 100])
def test_rolling_window_gives_every_unit_as_many_turns(first):
    turns = [units["g"] for units in draws("rolling", rounds=range(first, first + 16))]
    np.testing.assert_array_equal(np.bincount(np.concatenate(turns), minlength=16), 6)
    assert set(turns[0]) == {(first + i) % 16 for i in range(6)}


def test_digest_names_the_set_and_nothing_else():
    units = {"a": np.array([0, 2]), "b": np.array([1])}
    # Pinned: error feedback and results carry this digest from one version to the next.
    assert digest(units) == "60b542c6baf8e8b29b7042a670c5ede78fa44de36bc041168dbb5110dfc2901e"
    assert digest(dict(reversed(units.items()))) == digest(units)
    for other in ({"a": [0, 2]}, {"a": [0], "b": [1, 2]}, {"a": [0, 2], "c": [1]}):
        assert digest({g: np.array(indices) for g, indices in other.items()}) != digest(units)


@pytest.mark.parametrize("name", SMALL)
def test_what_is_cut_pastes_back_where_it_was(name):
    model, shape, _, _ = make(name)
    layout, state = layout_of(model, shape), weights(model)
    units = choose(layout, 0.4, "random", seed=1, round_=2, device="a")
    part = cut(state, layout, units)
    for key, tensor in paste(state, part, layout, units).items():
        np.testing.assert_array_equal(tensor, state[key])
    places = all_places(layout, units)
    moved = {key: tensor + 1 for key, tensor in part.items()}
    pasted = paste(state, moved, layout, units)
    for key, tensor in cut(pasted, layout, units).items():
        np.testing.assert_array_equal(tensor, moved[key])
        np.testing.assert_array_equal(state[key][np.ix_(*places[key])], part[key])
        assert np.count_nonzero(pasted[key] != state[key]) == tensor.size
        assert tensor.flags.c_contiguous


def test_sub_model_at_keep_rate_1_is_a_copy():
    model, shape, _, _ = make("MobileNet")
    layout, state = layout_of(model, shape), weights(model)
    units = choose(layout, 1.0, "random", seed=1, round_=2, device="a")
    for key, tensor in cut(state, layout, units).items():
        np.testing.assert_array_equal(tensor, state[key])
        assert not np.shares_memory(tensor, state[key])


@pytest.mark.parametrize("keep_rate", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_keep_rate_out_of_range_is_refused(keep_rate):
    with pytest.raises(StillhouseError, match=r"more than 0 and at most 1 .*, got (-?\d|nan|inf)"):
        kept_widths(Layout({"g": 4}, {}, {}), keep_rate)
