"""What hostile devices cost: they do what is said of them, and runs become records and a table."""

import json

import numpy as np
import pytest

from benchmarks.hostile import attacks
from benchmarks.hostile.__main__ import main, table
from benchmarks.hostile.attacks import FLIP, NOISE, Hostile
from orchestrator import datasets
from orchestrator.strategies.global_model import Update
from wire.messages import Result


def test_hostile_devices_alone_train_on_other_labels_or_pictures(tmp_path):
    shards = tmp_path / "data"
    datasets.build("digits", shards, devices=5, per_device=20, heldout_samples=40)
    names = attacks.hostile(5, 0.2)
    assert names == ["device-4"]
    for attack in ("label flips", "backdoor", "none"):
        attacks.poison(shards, tmp_path / attack, attack, names)
        for number in range(5):
            before, after = (
                np.load(folder / f"device-{number}.npz") for folder in (shards, tmp_path / attack)
            )
            changed = {key for key in before.files if not np.array_equal(before[key], after[key])}
            expected = {"label flips": {"y"}, "backdoor": {"x", "y"}}.get(attack, set())
            assert changed == (expected if number == 4 else set())


@pytest.mark.parametrize("attack", ["sign flips", "noise", "none"])
def test_only_hostile_devices_send_something_else(attack):
    update = Update({"w": np.linspace(-1, 1, 1000, dtype=np.float32)})
    chosen = Hostile(attack, ("device-4",))
    results = [Result(f"device-{number}", "run", 1, 1, 10) for number in (3, 4)]
    honest, sent = (attacks._sent(update, chosen, result, 0).tensors["w"] for result in results)
    assert np.array_equal(honest, update.tensors["w"])
    if attack == "noise":
        length = np.sqrt(np.square(sent).mean()) / np.sqrt(np.square(honest).mean())
        assert length == pytest.approx(NOISE, rel=0.1)
    else:
        factor = FLIP if attack == "sign flips" else 1
        np.testing.assert_allclose(sent, factor * honest)


def test_runs_become_records_and_a_table(tmp_path, capsys):
    chosen = "fedavg, median, sign flips;feddropout, multi_krum, backdoor"
    line = ["--data", "digits", "--devices", "5", "--per-device", "20", "--rounds", "1", "--seeds",
            "1", "--eval-every", "1", "--out", str(tmp_path)]  # fmt: skip
    assert main([*line, "--settings", chosen]) == 0, capsys.readouterr().err
    records = json.loads((tmp_path / "digits.json").read_text())
    assert [r["setting"]["name"] for r in records] == chosen.split(";")
    for record in records:
        assert 0 <= record["accuracy"]["1"] <= 1
        assert 0 <= record["into_target"] <= 1
    for strategy, rule in (("fedavg", "median"), ("feddropout", "multi_krum")):
        assert next(table(strategy, records).columns[0].cells) == rule
    assert main([*line, "--settings", "fedavg, mode"]) == 2
    assert "no setting is named 'fedavg, mode'; known are: all;" in capsys.readouterr().err
