"""The field instrument: its figures are those of the graph, of ONNX Runtime, and of the kernel."""

import json

import pytest
import torch
from safetensors.numpy import load_file

import models
from edge_agent import measure, sensors
from edge_agent.main import main
from tools.export import export
from wire.artifact import open_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("measure") / "artifact"
    torch.manual_seed(0)
    model = models.build("resnet8", classes=4, input_shape=(3, 16, 16))
    export(model, name="resnet8", classes=4, input_shape=(3, 16, 16), batch=8, out=out)
    return open_artifact(out)


@pytest.fixture(scope="module")
def report(artifact):
    return measure.measure(artifact, threads=1, steps=4)


def test_costs_are_the_exporters(report, artifact):
    """That these are PyTorch's own counts is tested where they are made."""
    train = artifact.manifest.graphs["train"]
    told = [(r["name"], r["phase"], r["flops"], r["bytes"]) for r in report["layers"]]
    assert told == [(row.name, row.phase, row.flops, row.bytes) for row in train.layers]
    assert report["artifact"]["step_flops"] == sum(row.flops for row in train.layers) > 3e7


def test_every_node_of_the_graph_is_timed(artifact):
    times = measure._node_times(artifact, load_file(artifact.weights), 1)
    assert set(times) == set(range(len(artifact.manifest.graphs["train"].nodes.row)))
    assert all(seconds >= 0 for seconds in times.values())
    heavy = {r["name"] for r in measure._layers(artifact.manifest.graphs["train"], times, 1)
             if r["seconds"] > 0}  # fmt: skip
    assert {"extractor.0", "blocks.0.conv2", "blocks.1.conv2"} <= heavy


def test_memory_is_the_kernels_and_the_exporters(report, artifact):
    memory = report["memory"]
    assert memory["foretold_bytes"] == artifact.manifest.memory.process
    assert memory["train_peak_bytes"] >= memory["idle_bytes"] > 10e6
    assert memory["pss_bytes"] > 10e6
    assert {"extract_peak_bytes", "eval_peak_bytes"} <= set(memory)


def test_the_largest_batch_is_the_one_that_takes_the_budget(artifact):
    memory = artifact.manifest.memory
    assert measure._largest_batch(artifact.manifest, memory.process) == 8
    assert measure._largest_batch(artifact.manifest, memory.process + memory.tensors) == 16
    assert measure._largest_batch(artifact.manifest, 1000) == 0


def test_rates_follow_from_what_was_measured(report):
    step = report["step"]
    assert step["images_per_s"] == pytest.approx(8 / step["median_s"])
    assert step["gflops"] == pytest.approx(
        report["artifact"]["step_flops"] / step["median_s"] / 1e9
    )
    assert step["quartiles_s"][0] <= step["median_s"] <= step["quartiles_s"][2]
    assert min(report["machine"].values()) > 0.1


def test_energy_and_throttling_of_the_timed_steps_are_told(artifact, monkeypatch):
    told = iter([(), ("under-voltage",), ("throttled",), ("under-voltage", "throttled")])
    monkeypatch.setattr(sensors, "throttling", lambda **_: next(told))
    monkeypatch.setattr(sensors, "power", lambda: sensors.Integral("meter", lambda: 2.0))
    report = measure.measure(artifact, threads=1, steps=2)
    assert report["energy"]["watts"] > 0
    assert report["energy"]["joules_per_sample"] > 0
    assert report["valid"] is False
    text = measure.text(report)
    assert "W by meter" in text
    assert "held back by nothing before, by throttled meanwhile, by throttled after" in text


def test_a_step_of_micro_batches_is_told_as_a_whole(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet8", classes=4, input_shape=(3, 8, 8))
    export(model, name="resnet8", classes=4, input_shape=(3, 8, 8), batch=8, micro_batches=2,
           out=tmp_path / "artifact")  # fmt: skip
    report = measure.measure(open_artifact(tmp_path / "artifact"), threads=1, steps=2)
    assert sum(r["flops"] for r in report["layers"]) == report["artifact"]["step_flops"]


def test_the_command_prints_for_people_and_writes_for_programs(artifact, tmp_path, capsys):
    out = tmp_path / "measured.json"
    command = ["measure", "--artifact", str(artifact.folder), "--threads", "1", "--steps", "2"]
    assert main([*command, "--json", str(out)]) == 0
    told = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["format"] == measure.FORMAT
    assert written["artifact"]["digest"] == artifact.digest
    for text in ("resnet8, batch 8, on ", "GFLOP/s of a matrix product", "foretold",
                 "blocks.0.conv2           backward"):  # fmt: skip
        assert text in told


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--artifact", "nowhere"], "nowhere/manifest.json: cannot be read"),
        (["--artifact", "nowhere", "--steps", "0"], "--steps of 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, text, capsys):
    assert main(["measure", *arguments]) == 2
    assert text in capsys.readouterr().err
