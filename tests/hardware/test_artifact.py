"""The artifact in the package, which `edge-agent measure` uses on a fresh device."""

import json
import sys
from pathlib import Path

import pytest

from edge_agent.field import identity, measure
from edge_agent.main import main
from hardware import deb
from tools.export.__main__ import main as export
from wire.artifact import open_artifact


@pytest.fixture(scope="module")
def brought(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree") / "share/stillhouse/resnet8"
    deb.measured_artifact(folder)
    return folder


def test_a_device_without_a_run_measures_resnet8(brought, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "INSTALLED", brought)
    monkeypatch.setattr(identity, "INSTALLED", tmp_path / "nowhere.toml")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    out = tmp_path / "measured.json"
    assert main(["measure", "--threads", "1", "--steps", "1", "--json", str(out)]) == 0
    assert "resnet8, batch 32, on " in capsys.readouterr().out
    made = json.loads(out.read_text())["artifact"]
    assert (made["task"], made["model"]["input"], made["parameters"]) == (
        "distill",
        [3, 32, 32],
        10586,
    )


def test_it_is_small_and_the_one_that_the_agent_tells_to_make(brought, tmp_path):
    assert sum(path.stat().st_size for path in brought.iterdir()) < 400_000
    command = ["--model", "resnet8", "--classes", "10", "--batch", "32"]  # from the error's remedy
    assert export([*command, "--out", str(tmp_path / "made")]) == 0
    assert open_artifact(tmp_path / "made").digest == open_artifact(brought).digest


def test_a_checkouts_environment_holds_it_where_the_package_does():
    assert Path(sys.prefix) / "share/stillhouse/resnet8" == measure.INSTALLED


def test_a_build_without_pytorch_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(deb.PackageError, match="torch is missing: build in the environment"):
        deb.measured_artifact(tmp_path / "resnet8")
