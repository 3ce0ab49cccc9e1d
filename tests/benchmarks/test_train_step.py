"""The benchmark of a training step: a short real race, and the report of contenders that fail."""

import json
import math

import pytest

from benchmarks import race
from benchmarks.race import Course, Entry
from benchmarks.train_step import report
from benchmarks.train_step.__main__ import main


@pytest.mark.e2e
def test_a_short_run_reports_every_contender_or_why_it_is_missing(tmp_path, capsys):
    out, blocked = tmp_path / "step.json", tmp_path / "file"
    blocked.write_text("no environment can be made under a file")
    code = main(
        ["--batch", "4", "--threads", "2", "--rounds", "1", "--seconds", "0.2", "--without",
         "pytorch-compile", "--cache", str(blocked), "--json", str(out)]
    )  # fmt: skip
    assert code == 0
    text = json.loads(out.read_text())
    assert text["setting"] == {
        "model": "resnet8", "task": "distill", "batch": 4, "input": [3, 32, 32]
    }  # fmt: skip
    assert text["machine"]["cores"] > 0
    # Three times the forward pass, less the gradient of the images, which is not computed.
    assert 50e6 < text["flops_per_image"] < 60e6
    (run,) = text["runs"]
    assert run["threads"] == 2
    by_name = {figure["name"]: figure for figure in run["contenders"]}
    missing = by_name.pop("onnxruntime-training")
    assert "venv" in missing["failed"]
    assert set(by_name) == {"stillhouse", "pytorch", "pytorch-channels-last"}
    for figure in by_name.values():
        assert not figure["failed"]
        (rate,) = figure["images_per_s"]
        assert rate == figure["median"] == figure["lowest"] == figure["highest"]
        for key in ("median", "to_stillhouse", "to_eager"):
            assert math.isfinite(figure[key])
            assert figure[key] > 0
        assert 0 < figure["gemm_share"] < 10  # on a busy machine, the measured peak may be too low
        assert figure["peak_bytes"] > 20e6
        assert figure["first_loss"] == pytest.approx(by_name["stillhouse"]["first_loss"], rel=1e-3)
    assert by_name["stillhouse"]["to_stillhouse"] == 1
    assert 1 in (by_name["pytorch"]["to_eager"], by_name["pytorch-channels-last"]["to_eager"])
    assert run["agent_peak_bytes"] > by_name["stillhouse"]["peak_bytes"] / 2
    assert run["gemm_flops_per_s"][0] > 1e8
    table = capsys.readouterr().out
    assert "left out: " in table
    assert "agent (whole process)" in table


MODULE = """\
import sys
from tools import worker

def prepare():
    print("libraries print")
    if sys.argv[1] == "unprepared":
        raise OSError("no such peer")
    left = iter([1.0, 2.0, 3.0])

    def turn(seconds):
        value = next(left)
        if sys.argv[1] == "faulty" and value == 2:
            raise ArithmeticError("diverged")
        if sys.argv[1] == "killed" and value == 2:
            sys.exit("out of memory")
        return {"images_per_s": value}

    return turn, 0.5

worker.serve(prepare)
"""


def test_a_contender_that_fails_leaves_with_its_reason_and_the_others_go_on(tmp_path):
    (tmp_path / "contender.py").write_text(MODULE)
    paths = {"PYTHONPATH": f"{race.PATHS['PYTHONPATH']}:{tmp_path}"}
    names = ("sound", "unprepared", "faulty", "killed")
    entries = [Entry(name, ["contender", name], environment=paths) for name in names]
    courses = race.run(
        entries, threads=1, rounds=3, seconds=0.1, logs=tmp_path, say=lambda _: None
    )  # fmt: skip
    sound, unprepared, faulty, killed = courses
    assert (sound.turns, sound.loss, sound.failed) == ([1, 2, 3], 0.5, "")
    assert sound.peak_bytes > 1e6
    assert unprepared.failed == "OSError: no such peer"
    assert faulty.failed == "ArithmeticError: diverged"
    assert "out of memory" in killed.failed


def test_ratios_are_taken_within_a_round():
    """If the machine halves its speed after the first round, no ratio changes."""

    def course(name, turns, failed=""):
        return Course(Entry(name, []), 1.0, turns, 1, failed)

    run = report.summarize(
        2,
        [
            course("gemm", [90.0, 100.0, 50.0]),
            course("stillhouse", [40.0, 20.0, 20.0]),
            course("pytorch", [20.0, 10.0, 10.0]),
            course("pytorch-channels-last", [30.0, 15.0, 15.0]),
            course("pytorch-compile", [], "no compiler"),
        ],
        course("agent", [12.0]),
        flops=2.0,
    )
    ours, nchw, nhwc, failed = run.contenders
    assert (ours.to_stillhouse, nchw.to_stillhouse, nhwc.to_stillhouse) == (1, 0.5, 0.75)
    assert (ours.to_eager, nhwc.to_eager) == (40 / 30, 1)
    assert (ours.median, ours.lowest, ours.highest) == (20, 20, 40)
    assert ours.gemm_share == pytest.approx(20 * 2 / 100)
    assert failed.failed == "no compiler"
