"""The benchmark of a round counts every byte and every device, or says what it cannot measure."""

import json
import math

import pytest

from benchmarks.round_overhead import __main__ as command
from benchmarks.round_overhead import flower, report
from benchmarks.round_overhead.report import Course
from benchmarks.round_overhead.turn import SHAPES, VALUES, Turn
from orchestrator import broker

DEVICES, ROUNDS = 2, 2


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The record of a short run of our contenders, and its output."""
    out = tmp_path_factory.mktemp("round") / "round.json"
    code = command.main(
        ["--devices", str(DEVICES), "--rounds", str(ROUNDS), "--turns", "1", "--without", "flower",
         "--json", str(out)]
    )  # fmt: skip
    assert code == 0
    return json.loads(out.read_text())


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["embedded", "mosquitto", "tls"])
def test_every_device_returns_and_every_byte_is_counted(record, name):
    if name != "embedded" and broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    (figure,) = (f for f in record["contenders"] if f["name"] == name)
    assert (record["devices"], record["rounds"], record["turns"]) == (DEVICES, ROUNDS, 1)
    assert record["values"] == VALUES == sum(map(math.prod, SHAPES))
    assert not figure["failed"]
    assert figure["of_flower"] is None
    ((*seconds,),) = figure["seconds"]
    assert len(seconds) == ROUNDS
    assert 0 < figure["lowest"] <= figure["median"] <= figure["highest"] == max(seconds)
    assert figure["returned"] == [DEVICES] * ROUNDS
    floats = 4 * VALUES * DEVICES  # bytes as float32; little is sent besides
    assert floats < figure["bytes_up"] < 1.01 * floats
    assert floats < figure["bytes_down"] < 1.01 * floats
    weights = figure["weights"]
    for when in ("fresh", "after", "peak"):
        assert len(weights[when]) == DEVICES
        for memory in weights[when]:
            assert memory["processes"] == 1
            assert 10e6 < memory["pss"] <= memory["rss"] < 1e9
    assert all(p["rss"] > f["rss"] for p, f in zip(weights["peak"], weights["fresh"], strict=True))


def test_a_peer_that_cannot_be_installed_is_named_and_ours_goes_on(tmp_path, capsys, monkeypatch):
    def play(_plan, _folder):
        return Turn((0.5, 0.75), (DEVICES,) * 2, (10,) * 2, (20,) * 2)

    monkeypatch.setattr(command, "Fleet", lambda *_, **_kw: play)
    blocked, out = tmp_path / "file", tmp_path / "round.json"
    blocked.write_text("no environment can be made under a file")
    arguments = ["--rounds=2", "--without=mosquitto", "--without=tls", f"--cache={blocked}"]
    assert command.main([*arguments, "--json", str(out)]) == 0
    ours, missing = json.loads(out.read_text())["contenders"]
    assert (ours["name"], ours["median"], ours["seconds"]) == ("embedded", 0.625, [[0.5, 0.75]] * 3)
    assert "venv" in missing["failed"]
    assert "flower left out: " in capsys.readouterr().out


def test_ratios_are_taken_within_a_turn():
    """If the machine halves its speed after the first turn, no ratio changes."""

    def course(name, *turns, failed=""):
        return Course(name, turns=[Turn(seconds, (1,)) for seconds in turns], failed=failed)

    ours, failed, flower_ = report.summarize(
        [
            course("mosquitto", (1.0, 1.0, 9.0), (2.0, 2.0, 2.0)),
            course("embedded", failed="no port"),
            course("flower", (10.0, 10.0, 10.0), (20.0, 20.0, 1.0)),
        ]
    )
    assert (ours.of_flower, flower_.of_flower) == (0.1, 1)
    assert (ours.lowest, ours.median, ours.highest) == (1, 2, 9)
    assert failed.failed == "no port"


def test_the_environment_of_flower_is_pinned():
    assert all("==" in requirement for requirement in flower.REQUIREMENTS)
