"""Robust averages are what their papers define, and hostile devices do not move them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Average, robust, submodel
from models.robust import RobustAverage
from tests.models.test_average import draw_updates, network

RULES = ("median", "trimmed_mean", "multi_krum")


def state_of(layout, rng):
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in layout.shapes.items()}


def total(state, updates, layout=None, **settings):
    chosen = {"rule": "mean", "hostile": 0.2, "clip": 0.0} | settings
    average = RobustAverage(state, layout, **chosen)
    for units, update, samples in updates:
        average.add(update, units, samples)
    return average.total(), average.distances


def in_a_loop(values, rule, f):
    """A coordinate's rule over the devices that hold it."""
    if not values:
        return 0.0
    if rule == "median":
        return float(np.median(values))
    if len(values) <= 2 * f:
        return float(np.median(values))
    return float(np.mean(sorted(values)[f : len(values) - f]))


@given(
    rates=st.lists(st.floats(0.05, 1), min_size=1, max_size=6),
    rule=st.sampled_from(["median", "trimmed_mean"]),
    hostile=st.floats(0, 0.49),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_medians_and_trimmed_means_are_those_of_a_coordinates_holders(rates, rule, hostile, seed):
    layout, rng = network(), np.random.default_rng(seed)
    state = state_of(layout, rng)
    updates = list(draw_updates(rng, layout, [1 + 7 * k for k in range(len(rates))], rates))
    cut = [(units, submodel.cut(whole, layout, units), n) for units, whole, n in updates]
    found, _ = total(state, cut, layout, rule=rule, hostile=hostile)
    for name, before in state.items():
        held = np.full((len(cut), *before.shape), np.nan)
        for row, (units, part, _) in zip(held, cut, strict=True):
            places = submodel.all_places(layout, units)[name]
            row[np.ix_(*places)] = part[name]
        for index in np.ndindex(before.shape):
            values = [v for v in held[(slice(None), *index)] if np.isfinite(v)]
            wanted = before[index] + in_a_loop(values, rule, int(hostile * len(cut)))
            assert found[name][index] == pytest.approx(wanted, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("absent", ["zero", "holders"])
def test_without_a_rule_it_is_the_mean_bit_for_bit(absent):
    layout, rng = network(), np.random.default_rng(0)
    state = state_of(layout, rng)
    updates = [
        (units, submodel.cut(whole, layout, units), n)
        for units, whole, n in draw_updates(rng, layout, [7, 11, 600], [0.5, 0.5, 1.0])
    ]
    plain = Average(state, layout, samples_total=618, absent=absent)
    for units, update, n in updates:
        plain.add(update, units, n)
    found, _ = total(state, updates, layout, absent=absent)
    for name, array in plain.total().items():
        assert np.array_equal(array, found[name])


def test_multi_krum_keeps_the_updates_whose_nearest_ones_are_nearest():
    """By the definition: a sum over the n - f - 2 nearest, of distances of whole updates."""
    rng = np.random.default_rng(2)
    state = {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}
    updates = [
        {n: rng.standard_normal(a.shape).astype(np.float32) for n, a in state.items()}
        for _ in range(9)
    ]
    for hostile in updates[:2]:
        hostile["b"] += 4
    found, distances = total(state, [(None, u, 5) for u in updates], rule="multi_krum", hostile=0.3)
    f = 2
    units = {n: np.median([np.sqrt(np.square(u[n]).mean()) for u in updates]) for n in state}
    flat = np.array([np.concatenate([(u[n] / units[n]).ravel() for n in state]) for u in updates])
    scores = []
    for k, mine in enumerate(flat):
        others = np.sort(np.square(np.delete(flat, k, 0) - mine).sum(1))
        scores.append(others[: 9 - f - 2].sum())
    chosen = np.argsort(scores)[: 9 - f]
    assert not {0, 1} & set(chosen.tolist())
    for name in state:
        wanted = np.mean([updates[k][name] for k in chosen], axis=0)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6)
    assert min(distances[:2]) > max(distances[2:])


def honest(rng, n, state):
    """Updates that agree up to noise, with a batch norm's variances thousands of times longer."""
    shared = {
        k: rng.standard_normal(a.shape) * (1e3 if "var" in k else 1) for k, a in state.items()
    }
    return [
        {
            k: (a + 0.3 * np.abs(a).mean() * rng.standard_normal(a.shape)).astype(np.float32)
            for k, a in shared.items()
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize("sub_models", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "attack",
    [lambda a: -5 * a, lambda a: a + 1e4, lambda a: np.full_like(a, 1e30), np.zeros_like],
    ids=["sign-flip", "shift", "huge", "zero"],
)
def test_two_of_ten_hostile_devices_move_no_rule_far(rule, attack, sub_models):
    rng, layout = np.random.default_rng(3), network()
    state = {n: np.zeros(s, np.float32) for n, s in layout.shapes.items()}
    good = honest(rng, 8, state)
    bad = [{n: attack(a).astype(np.float32) for n, a in u.items()} for u in good[:2]]
    clean, _ = total(state, [(None, u, 5) for u in good])
    devices = [
        (
            submodel.choose(layout, 0.8, "random", seed=0, round_=1, device=str(k))
            if sub_models
            else None,
            update,
            5 if k < 8 else 1 << 40,  # whatever number of samples it states
        )
        for k, update in enumerate([*good, *bad])
    ]
    if sub_models:
        devices = [(units, submodel.cut(u, layout, units), n) for units, u, n in devices]
    found, distances = total(state, devices, layout, rule=rule, hostile=0.2)
    for name, array in clean.items():
        apart = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
        assert apart < 0.5, name
    assert min(distances[8:]) > max(distances[:8])


def test_clipping_bounds_what_one_device_moves():
    rng, state = np.random.default_rng(4), {"a": np.zeros(50, np.float32)}
    good = [{"a": rng.standard_normal(50).astype(np.float32)} for _ in range(4)]
    bad = {"a": np.full(50, -1e6, np.float32)}
    found, _ = total(state, [(None, u, 5) for u in [*good, bad]], clip=1.5)
    median = np.median([np.sqrt(np.square(u["a"]).mean()) for u in [*good, bad]])
    short = [u["a"] * min(1, 1.5 * median / np.sqrt(np.square(u["a"]).mean())) for u in good]
    wanted = (np.sum(short, axis=0) - 1.5 * median) / 5
    np.testing.assert_allclose(found["a"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_few_devices_are_averaged_too(rule, n):
    rng, state = np.random.default_rng(5), {"a": np.ones(6, np.float32)}
    updates = [(None, {"a": rng.standard_normal(6).astype(np.float32)}, 5) for _ in range(n)]
    found, distances = total(state, updates, rule=rule, hostile=0.4)
    low, high = (f([u["a"] for _, u, _ in updates], axis=0) for f in (np.min, np.max))
    assert ((found["a"] >= 1 + low - 1e-6) & (found["a"] <= 1 + high + 1e-6)).all()
    assert len(distances) == n


def test_an_update_that_changes_nothing_is_no_trouble():
    state = {"a": np.ones(6, np.float32), "scale": np.array(3, np.float32)}
    still = {name: np.zeros_like(array) for name, array in state.items()}
    for rule in (*RULES, "mean"):
        found, distances = total(state, [(None, still, 5)] * 5, rule=rule, clip=2.0)
        assert np.array_equal(found["a"], state["a"])
        assert found["scale"] == 3
        assert np.isfinite(distances).all()


def test_networks_are_joined_by_their_differences():
    rng = np.random.default_rng(6)
    networks = [{"w": (10 + rng.standard_normal((3, 3))).astype(np.float32)} for _ in range(5)]
    networks[4]["w"] *= -50
    for number, each in enumerate(networks):
        each["scale"] = np.array(number, np.float32)
    joined = robust.join(networks, [1] * 5, rule="median", hostile=0.2, clip=0.0)
    wanted = np.median([each["w"] for each in networks], axis=0)
    np.testing.assert_allclose(joined["w"], wanted, rtol=1e-5)
    assert joined["scale"] == 2
    clipped = robust.join(networks, [1] * 5, rule="mean", hostile=0.2, clip=1.0)
    assert np.abs(clipped["w"] - wanted).max() < 1.5
