"""The figures of Federated Dropout: small runs give the record that the table and curves need."""

import json

import numpy as np
import pytest

from benchmarks.federated_dropout import report, settings
from benchmarks.federated_dropout.__main__ import main


@pytest.fixture
def images(tmp_path):
    """Three hundred grey images whose class is where they are bright."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 10
    x = rng.integers(0, 60, (300, 28, 28, 1)).astype(np.uint8)
    for image, label in zip(x, y, strict=True):
        image[2 * label : 2 * label + 6, 4:20] += 150
    path = tmp_path / "images.npz"
    np.savez(path, x=x, y=y, classes=[str(c) for c in range(10)])
    return path


def test_runs_become_records_a_table_and_pictures(images, tmp_path, capfd):
    out = tmp_path / "out"
    command = ["--data", "mnist", "--train", str(images), "--heldout", str(images), "--devices",
               "10", "--rounds", "2", "--eval-every", "1", "--seeds", "1", "--settings", "eden",
               "--out", str(out)]  # fmt: skip
    assert main(command) == 0
    shown = capfd.readouterr().out
    records = json.loads((out / "mnist.json").read_text())
    assert [r["setting"]["name"] for r in records] == ["eden", "fedavg"]
    lossy, whole = records
    for record in records:
        assert list(record["accuracy"]) == ["1", "2"]
        assert record["refused"] == 0
        assert record["float32_bytes"] == 4 * 1_663_370
    assert 1 <= whole["bytes_up"] / whole["float32_bytes"] < 1.001
    assert report.factor([lossy], "bytes_up") > 60
    assert report.factor([lossy], "bytes_down") > 20
    assert 1.7 < whole["train_flops"] / lossy["train_flops"] < 1.8
    assert "1.76x" in shown
    assert (out / "mnist-beyond.png").stat().st_size > 10_000
    assert not (out / "mnist-paper.png").exists()  # no run of it was made
    # Finished runs are not repeated.
    before = (out / "mnist-eden-0.json").stat().st_mtime_ns
    assert main(command) == 0
    assert (out / "mnist-eden-0.json").stat().st_mtime_ns == before
    command[command.index("--devices") + 1] = "11"
    assert main(command) == 2
    assert "was dealt out with 10 devices, now it is 11" in capfd.readouterr().err


def test_the_spread_and_the_gap_are_of_the_same_seeds():
    def record(name, seed, accuracy):
        return {
            "setting": {"name": name, "keep_rate": 1.0, "down": "float32", "up": "float32"},
            "seed": seed, "rounds": 1, "accuracy": {"1": accuracy}, "float32_bytes": 4,
            "bytes_down": 4, "bytes_up": 4, "train_flops": 1,
        }  # fmt: skip

    records = [
        *(record("fedavg", 0, 0.9), record("fedavg", 1, 0.5), record("fedavg", 2, 0.4)),
        *(record("keep 0.5", 0, 0.8), record("keep 0.5", 1, 0.3)),
    ]
    table = report.table("mnist", records)
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["to FedAvg"] == ["+0.00 (+0.00, +0.00)", "-15.00 (-20.00, -10.00)"]
    assert cells["seeds"] == ["3", "2"]


def test_a_setting_comes_with_the_baseline():
    assert settings.find("eden")[0] == settings.BASELINE
