"""Updates of different sub-models are averaged as the formulas say, coordinate by coordinate."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from models import Average, average, submodel

SHAPE = (1, 4, 4)


@functools.cache
def network():
    """A network of 4 filters, each read at 2 x 2 places by 5 units, and 3 logits."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 3)
    )
    return models.layout(model, SHAPE)


def owners(name, index):
    """The units to which a coordinate belongs, written out by hand."""
    if name.startswith(("0.", "1.")):
        return [("0", index[0])]
    if name == "3.weight":
        return [("3", index[0]), ("0", index[1] // 4)]
    if name == "3.bias":
        return [("3", index[0])]
    return [("3", index[1])] if name == "4.weight" else []


def draw_updates(rng, layout, devices, keep_rates):
    for i, (samples, rate) in enumerate(zip(devices, keep_rates, strict=True)):
        units = submodel.choose(layout, rate, "random", seed=0, round_=1, device=str(i))
        whole = {n: rng.standard_normal(s).astype(np.float32) for n, s in layout.shapes.items()}
        yield units, whole, samples


def reference(state, updates, absent):
    """The average, by a loop over coordinates and devices."""
    result = {}
    total = sum(samples for _, _, samples in updates)
    for name, before in state.items():
        result[name] = np.empty_like(before)
        for index in np.ndindex(before.shape):
            held = [
                (samples, delta[name][index])
                for units, delta, samples in updates
                if all(unit in units[group] for group, unit in owners(name, index))
            ]
            weight = total if absent == "zero" else sum(samples for samples, _ in held)
            moved = sum(samples * float(delta) for samples, delta in held) / weight if held else 0.0
            result[name][index] = float(before[index]) + moved
    return result


@given(
    devices=st.lists(st.tuples(st.integers(1, 1000), st.floats(0.05, 1)), min_size=1, max_size=4),
    absent=st.sampled_from(["zero", "holders"]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_average_is_the_formula_at_every_coordinate(devices, absent, seed):
    layout, rng = network(), np.random.default_rng(seed)
    state = {n: rng.standard_normal(s).astype(np.float32) for n, s in layout.shapes.items()}
    updates = list(draw_updates(rng, layout, *zip(*devices, strict=True)))
    average = Average(
        state, layout, samples_total=sum(samples for samples, _ in devices), absent=absent
    )
    for units, whole, samples in updates:
        average.add(submodel.cut(whole, layout, units), units, samples)
    found = average.total()
    for name, expected in reference(state, updates, absent).items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("absent", ["zero", "holders"])
@pytest.mark.parametrize("all_units", [True, False])
def test_average_of_whole_models_is_fedavg_bit_for_bit(absent, all_units):
    layout, rng = network(), np.random.default_rng(0)
    state = {n: rng.standard_normal(s).astype(np.float32) for n, s in layout.shapes.items()}
    counts = [7, 11, 600, 3, 13]
    updates = list(draw_updates(rng, layout, counts, [1.0] * len(counts)))
    average = Average(state, layout, samples_total=sum(counts), absent=absent)
    expected = {name: tensor.astype(np.float64) for name, tensor in state.items()}
    for units, delta, samples in updates:
        average.add(delta, units if all_units else None, samples)
        for name in expected:
            expected[name] += (samples / sum(counts)) * delta[name]
    for name, tensor in average.total().items():
        np.testing.assert_array_equal(tensor, expected[name].astype(np.float32))


def test_coordinate_that_nobody_holds_stays_bit_for_bit():
    layout, rng = network(), np.random.default_rng(0)
    state = {n: rng.standard_normal(s).astype(np.float32) for n, s in layout.shapes.items()}
    units = submodel.choose(layout, 0.5, "ordered", seed=0, round_=1, device="a")
    for absent in ("zero", "holders"):
        average = Average(state, layout, samples_total=5, absent=absent)
        part = submodel.cut({n: np.ones_like(a) for n, a in state.items()}, layout, units)
        average.add(part, units, 5)
        after = average.total()
        np.testing.assert_array_equal(after["0.weight"][2:], state["0.weight"][2:])
        np.testing.assert_allclose(after["0.weight"][:2], state["0.weight"][:2] + 1, rtol=1e-6)


def test_absent_units_slow_the_paper_and_not_the_holders():
    layout = network()
    state = {n: np.zeros(s, np.float32) for n, s in layout.shapes.items()}
    ones = {n: np.ones_like(a) for n, a in state.items()}
    moved = {}
    for absent in ("zero", "holders"):
        average = Average(state, layout, samples_total=400 * 5, absent=absent)
        for i in range(400):
            units = submodel.choose(layout, 0.5, "random", seed=0, round_=1, device=str(i))
            average.add(submodel.cut(ones, layout, units), units, 5)
        moved[absent] = average.total()
    # 2 of 4 filters, 2 of 5 units.
    assert moved["zero"]["0.weight"].mean() == pytest.approx(0.5)
    assert moved["zero"]["3.weight"].mean() == pytest.approx(0.5 * 0.4)
    assert all(np.allclose(tensor, 1) for tensor in moved["holders"].values())


@pytest.mark.parametrize(
    ("samples", "max_weight", "expected"),
    [
        ([10, 10, 100], 10.0, [10, 10, 100]),
        ([10, 10, 101], 10.0, [10, 10, 100]),
        ([3, 5, 7, 9], 1.5, [3, 5, 7, 7]),  # the lower median is 5; 7.5 is rounded down
        ([10**12], 1.0, [10**12]),  # a single device is the median
    ],
)
def test_nobody_counts_more_than_max_weight_times_the_median(samples, max_weight, expected):
    assert average.counted(samples, max_weight) == expected


def test_a_mean_of_networks_is_weighted_by_samples():
    networks = [{"w": np.array([1, 2], np.float32)}, {"w": np.array([4, 8], np.float32)}]
    found = average.mean(networks, [1, 2])["w"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([3, 6], np.float32))
