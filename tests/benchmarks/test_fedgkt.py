"""The experiments of FedGKT: small runs give the record that the table and pictures need."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest

import models
from benchmarks.fedgkt import page, report, settings
from benchmarks.fedgkt.__main__ import deal, main
from benchmarks.fedgkt.settings import BASE, GROUPS, Plan
from orchestrator import broker
from tests.conftest import ROOT
from wire.errors import SettingsError

PLAN = Plan("digits", "digits", "iid", None, 3, 20, 40, "resnet10", 1, "float32", 1, 20, 0.05,
            "constant", None, 1)  # fmt: skip


def command(out, *more):
    return ["--data", "digits", "--preset", "cpu", "--precision", "float32", "--server-epochs", "1",
            "--devices", "3", "--per-device", "20", "--heldout-limit", "40", "--batch", "20",
            "--epochs", "1", "--eval-every", "1", "--rounds", "2", "--seeds", "1",
            "--out", str(out), *more]  # fmt: skip


RAN = ("--settings", "resnet8 alone;fedavg resnet8;relu|q=1|zstd")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with the results of a few settings: three strategies, and another codec."""
    out = tmp_path_factory.mktemp("runs")
    assert main(command(out, *RAN)) == 0
    return out


def test_a_run_becomes_a_record(done):
    records = {r["setting"]["name"]: r for r in json.loads((done / "digits.json").read_text())}
    assert set(records) == {"two-way", "resnet8 alone", "fedavg resnet8", "relu|q=1|zstd"}
    for record in records.values():
        assert record["options"]["server_model"] == "resnet10"
        assert (record["rounds"], record["devices"], record["refused"]) == (2, 3, 0)
        assert list(record["bytes_up"]) == list(record["bytes_down"]) == ["1", "2"]
    taught, alone, averaged = (records[n] for n in ("two-way", "resnet8 alone", "fedavg resnet8"))
    assert list(taught["server_accuracy"]) == list(taught["device_accuracy"]) == ["1", "2"]
    assert list(alone["device_accuracy"]) == list(averaged["server_accuracy"]) == ["1", "2"]
    assert alone["server_accuracy"] == averaged["device_accuracy"] == {}
    assert taught["bytes_down"]["1"] == 0 < taught["bytes_down"]["2"]  # no teacher at first
    # At most one bit for each of 16,384 values, and logits; without weights (2,117 bytes a sample).
    few, many = records["relu|q=1|zstd"]["feature_bytes"], taught["feature_bytes"]
    assert 500 < few < 2048 + 100 < many < 4 * 2048 + 100
    assert alone["feature_bytes"] is None
    # A step costs three forward passes; its first layer needs no gradient of the images.
    assert taught["train_flops"] == pytest.approx(3 * 19.24e6 * 20, rel=0.1)


def test_what_is_done_is_not_done_again(done, capfd):
    before = {path: path.stat().st_mtime_ns for path in done.glob("digits-*-0.json")}
    assert main(command(done, *RAN)) == 0
    assert len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shown = capfd.readouterr().out
    assert "digits: 2 rounds" in shown
    assert "seed 0: two-way" not in shown


def test_runs_whose_records_were_copied_are_not_done_again(done, tmp_path, capfd):
    (tmp_path / "digits.json").write_bytes((done / "digits.json").read_bytes())
    assert main(command(tmp_path, *RAN, "--lr", "0.1")) == 2
    assert "was begun with lr 0.05 (now 0.1)" in capfd.readouterr().err
    assert main(command(tmp_path, *RAN)) == 0
    assert "seed 0: two-way" not in capfd.readouterr().out
    assert (tmp_path / "digits.json").read_bytes() == (done / "digits.json").read_bytes()
    (tmp_path / "digits.json").write_text('[{"seed": 0}]')
    assert main(command(tmp_path, *RAN)) == 2
    assert "digits.json is damaged ('setting'); restore or remove it" in capfd.readouterr().err


def test_pictures_are_of_the_groups_that_ran(done):
    drawn = {path.name for path in done.glob("digits-*.png") if path.stat().st_size > 10_000}
    assert drawn == {"digits-compare.png", "digits-payload.png", "digits-payload-bytes.png"}


def test_other_options_are_refused_by_name(done, capsys):
    assert main(command(done, "--server-epochs", "3", "--lr", "0.1")) == 2
    told = capsys.readouterr().err
    assert "was begun with server_epochs 1 (now 3), lr 0.05 (now 0.1)" in told
    assert "write to another --out" in told


def test_a_run_in_pieces_is_the_run_at_once(done, tmp_path, capfd):
    assert main(command(tmp_path, "--settings", "two-way", "--pieces", "0.001")) == 3
    shown = capfd.readouterr().out
    assert "digits-two-way-0: 1 of 2 rounds" in shown
    assert "1 of 1 runs are not done; the same command goes on" in shown
    assert not (tmp_path / "digits-two-way-0.json").exists()
    assert main(command(tmp_path, "--settings", "two-way", "--pieces", "10")) == 0
    pieces, at_once = (
        json.loads((folder / "digits-two-way-0.json").read_text()) for folder in (tmp_path, done)
    )
    for record in (pieces, at_once):
        for measured in ("seconds", "server_train_s", "peak_bytes"):
            assert record.pop(measured) > 0
    assert pieces == at_once


@pytest.mark.skipif(broker.find() is None, reason="needs mosquitto")
def test_agents_over_mqtt_arrive_where_simulated_ones_do(tmp_path, capsys):
    """To the bit, since the simulated ones run the same compiled step in one thread."""
    found = []
    for way in (["--wire"], ["--engine", "onnx"]):
        out = tmp_path / way[-1]
        assert main(command(out, "--settings", "two-way", *way)) == 0, capsys.readouterr().err
        found.append(json.loads((out / "digits-two-way-0.json").read_text()))
    agents, simulated = found
    for key in ("server_accuracy", "device_accuracy", "train_flops"):
        assert agents[key] == simulated[key]
    assert sum(agents["bytes_up"].values()) < agents["broker_bytes"]["received"]
    assert agents["agent_peak_bytes"] > 50 << 20
    assert main(command(tmp_path / "late", "--settings", "30 % late", "--wire")) == 2
    assert "--wire: devices are late in 30 % late, which is" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["iid", "dirichlet"])
def test_another_number_of_devices_has_the_same_images(split, tmp_path):
    options = argparse.Namespace(out=tmp_path, train="", heldout=None, alpha=1.0)
    plan = Plan(**(vars(PLAN) | {"split": split}))
    (central,) = (s for s in GROUPS["compare"] if s.name == "centralized")
    images = []
    for setting, devices in ((BASE, 3), (central, 1)):
        deal(options, plan, setting, 0)
        folder = settings.data_folder(setting, plan, 0, tmp_path)
        shards = [np.load(path)["x"] for path in sorted(folder.glob("device-*.npz"))]
        assert len(shards) == devices
        images.append(sorted(image.tobytes() for shard in shards for image in shard))
    assert len(images[0]) == 60
    assert images[0] == images[1]


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(
        SettingsError, match=r"named 'twoway'; known are: transfer; compare; .*none"
    ):
        settings.find("payload; twoway", 8)


def test_what_says_the_same_as_the_base_run_is_the_base_run():
    assert settings.find("every round; relu|q=4|zstd; 8 devices; two-way", 8) == [BASE]
    assert [s.name for s in settings.find("devices", 16)][1:] == [
        "8 devices",
        "64 devices",
        "128 devices",
    ]


@pytest.mark.parametrize("setting", [s for group in GROUPS.values() for s in group])
def test_every_setting_is_a_run(setting, tmp_path):
    plan = Plan(**(vars(PLAN) | {"data": "cifar100"}))
    if setting.start:
        with pytest.raises(
            SettingsError, match="begins with what 'centralized' ended with; run that"
        ):
            settings.run_config(setting, plan, seed=10, rounds=2, folder=tmp_path)
        (tmp_path / "cifar100-centralized-10.json").write_text('{"rounds": 2}')
    config = settings.run_config(setting, plan, seed=10, rounds=2, folder=tmp_path)
    models.build(config.device.model, classes=100)
    assert setting.whole == (config.device.model == settings.WHOLE[plan.server_model])
    assert config.cohort.min_devices == (setting.devices or 3)
    assert config.pretrained == (tmp_path / "cifar100-centralized-10" if setting.start else None)


@pytest.mark.parametrize(
    ("given", "reached"),
    [
        ([], (16, "resnet55", 20)),
        (["--split", "dirichlet"], (16, "resnet55", 10)),
        (["--preset", "cpu", "--server-epochs", "2"], (10, "resnet10", 2)),
    ],
)
def test_an_option_wins_over_the_preset(given, reached, tmp_path, capsys):
    """The option is read from the refusal of a folder that was begun with other settings."""
    odd = vars(PLAN) | {"devices": 0, "server_model": "", "server_epochs": 0}
    (tmp_path / "digits-options.json").write_text(json.dumps(odd))
    assert main(["--data", "digits", "--out", str(tmp_path), *given]) == 2
    told = capsys.readouterr().err
    devices, model, epochs = reached
    assert f"devices 0 (now {devices})" in told
    assert f"server_model  (now {model})" in told
    assert f"server_epochs 0 (now {epochs})" in told


def test_the_server_may_train_a_network_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\ndef large(classes, input_shape):\n"
        "    size = input_shape[0] * input_shape[1] * input_shape[2]\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(size, classes))\n"
    )
    plan = replace(PLAN, server_model="nets.py:large")
    made = settings.run_config(BASE, plan, seed=0, rounds=1, folder=tmp_path)
    assert models.build(made.server.model, classes=10, input_shape=(16, 32, 32))
    own = ("--server-model", "nets.py:large")
    assert main(command(tmp_path / "out", *own, "--settings", "fedavg large")) == 2
    assert "the whole network, which is known for the server's resnet10" in capsys.readouterr().err
    assert main(command(tmp_path / "out", "--server-model", "resnet12")) == 2
    assert "resnet12" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_run_begins_with_is_done_before_it():
    names = [setting.name for setting in settings.find("from centralized", 8)]
    assert names == ["two-way", "centralized", "from centralized"]


def record(name, seed, server, device):
    return {
        "setting": {"name": name}, "seed": seed, "rounds": 2, "devices": 2,
        "server_accuracy": {"1": 0.1, "2": server} if server else {},
        "device_accuracy": {"1": 0.1, "2": device} if device else {},
        "bytes_up": {"1": 3_000_000, "2": 1_000_000}, "bytes_down": {"1": 0, "2": 500_000},
        "seconds": 5.0,
    }  # fmt: skip


RECORDS = [
    *(record("two-way", 0, 0.9, 0.4), record("two-way", 1, 0.5, 0.2)),
    *(record("freeze after 1", 0, 0.8, 0.5), record("freeze after 1", 1, 0.3, 0.5)),
    record("fedavg large", 0, 0.7, 0),
    record("resnet8 alone", 1, 0, 0.1),
]


def test_the_table_pairs_runs_by_seed():
    cells = [list(column.cells) for column in report.table("digits", RECORDS).columns]
    names, seeds, server, to_server, device, to_device, up, sent, seconds = cells
    assert names == ["two-way", "fedavg large", "resnet8 alone", "freeze after 1"]
    assert seeds == ["2", "1", "1", "2"]
    assert server == ["70.00 (50.00-90.00)", "70.00", "", "55.00 (30.00-80.00)"]
    assert to_server[1:] == ["-20.00 (-20.00, -20.00)", "", "-15.00 (-20.00, -10.00)"]
    assert device[2:] == ["10.00", "50.00 (50.00-50.00)"]
    assert to_device[2:] == ["-10.00 (-10.00, -10.00)", "+20.00 (+10.00, +30.00)"]
    assert (up[0], sent[0], seconds[0]) == ("1.000", "4.5", "2.5")


def test_the_tables_of_the_docs_are_those_of_the_committed_records():
    text = (ROOT / "docs/fedgkt.md").read_text()
    for table in page.TABLES:
        assert f"\n\n{page.write(table, page.read(table))}\n" in text


def test_bytes_sent_are_drawn_where_features_travel_seldom(tmp_path):
    for each in RECORDS:
        name = each["setting"]["name"].replace(" ", "-")
        (tmp_path / f"digits-{name}-{each['seed']}.json").write_text(json.dumps(each))
    report.write(tmp_path, PLAN)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"digits-uplink.png", "digits-uplink-bytes.png", "digits-compare.png"}


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_no_piece_is_empty_or_endless(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(command(tmp_path, f"--pieces={text}"))
    assert end.value.code == 2
    assert f"--pieces: expected minutes over 0, got '{text}'" in capsys.readouterr().err
