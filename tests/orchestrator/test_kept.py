"""Kept state of simulated devices: files of runs from earlier versions can still be used."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orchestrator.simulation.kept import Kept
from wire.messages import BlobRef, Order

REF = BlobRef("ab" * 32, 1, 1024)
OWN = Order("run", 3, 3, REF, 1, 0.1, 7, {"state": "float32"})
FEEDBACK = replace(OWN, returns={"update": "float16"}, state=REF, feedback=True)
# Names in a file, and in a state.
NAMES = {
    "weights/fc.weight": "fc.weight",
    "weights/bn.running_mean": "bn.running_mean",
    "optimizer/momentum_buffer/fc.weight": "optim.momentum.fc.weight",
    "optimizer/exp_avg/fc.weight": "optim.exp_avg.fc.weight",
    "optimizer/exp_avg_sq/fc.weight": "optim.exp_avg_sq.fc.weight",
    "optimizer/step/": "optim.step",
}


def test_own_weights_have_the_names_that_they_always_had(tmp_path):
    here = Kept(tmp_path)
    filed = {name: np.full(2, n, np.float32) for n, name in enumerate(NAMES)}
    (tmp_path / "own/a").mkdir(parents=True)
    save_file(filed, tmp_path / "own/a/2.safetensors")
    state = here.of("a", OWN).read()
    assert {name: array[0] for name, array in state.items()} == {
        name: n for n, name in enumerate(NAMES.values())
    }
    here.put("a", OWN, state)
    again = load_file(tmp_path / "own/a/3.safetensors")
    assert again.keys() == filed.keys()
    assert all(np.array_equal(again[name], array) for name, array in filed.items())


@pytest.mark.parametrize(
    ("order", "folder", "next_", "files"),
    [
        (OWN, "own", replace(OWN, sequence=9, round=5), {"3", "5"}),
        (FEEDBACK, "owed", replace(FEEDBACK, sequence=9, round=5, owed=3), {"3", "9"}),
    ],
    ids=["own", "owed"],
)
def test_an_order_done_again_begins_as_before(tmp_path, order, folder, next_, files):
    """Only two files are kept: the one that an order began with, and the one that it left."""
    here = Kept(tmp_path)
    first, second = ({"w": np.full(2, n, np.float32)} for n in range(2))
    for earlier in (1, 2):
        here.put("a", replace(order, sequence=earlier, round=earlier), second)
    here.put("a", order, first)
    for _ in range(2):
        assert np.array_equal(here.of("a", next_).read()["w"], first["w"])
        here.put("a", next_, second)
        assert {path.stem for path in (tmp_path / folder / "a").iterdir()} == files


@pytest.mark.parametrize("order", [OWN, FEEDBACK, replace(OWN, state=REF)])
def test_a_first_order_finds_nothing(tmp_path, order):
    assert Kept(tmp_path).of("a", order).read() == {}
