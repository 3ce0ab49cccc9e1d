"""`edge-agent measure`: its figures agree with the graph, ONNX Runtime and the kernel."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import models
from edge_agent.field import identity, measure, sensors
from edge_agent.main import main
from ondevice import peer, roofline
from ondevice.config import AgentConfig
from tools.export import export
from wire import measurement, signing
from wire.address import BrokerAddress
from wire.artifact import open_artifact
from wire.errors import SettingsError, SignatureError


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


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return signing.own_key(tmp_path_factory.mktemp("key") / "device.pem")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder where a device without an agent.toml keeps its key; no package is installed."""
    monkeypatch.setattr(identity, "INSTALLED", tmp_path / "nowhere.toml")
    monkeypatch.setattr(measure, "INSTALLED", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_costs_are_the_exporters(report, artifact):
    """The exporter's own tests compare these counts with PyTorch's."""
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


def test_energy_and_throttling_of_the_timed_steps_are_told(artifact, monkeypatch, key):
    told = iter([(), ("under-voltage",), ("throttled",), ("under-voltage", "throttled")])
    monkeypatch.setattr(sensors, "throttling", lambda **_: next(told))
    monkeypatch.setattr(sensors, "power", lambda: sensors.Integral("meter", lambda: 2.0))
    report = measure.measure(artifact, threads=1, steps=2)
    assert report["energy"]["watts"] > 0
    assert report["energy"]["joules_per_sample"] > 0
    assert report["valid"] is False
    text = measure.text(measurement.sign(key, report))
    assert "W by meter" in text
    assert "held back by nothing before, by throttled meanwhile, by throttled after" in text


def test_a_step_of_micro_batches_is_told_as_a_whole(tmp_path):
    torch.manual_seed(0)
    model = models.build("resnet8", classes=4, input_shape=(3, 8, 8))
    export(model, name="resnet8", classes=4, input_shape=(3, 8, 8), batch=8, micro_batches=2,
           out=tmp_path / "artifact")  # fmt: skip
    report = measure.measure(open_artifact(tmp_path / "artifact"), threads=1, steps=1)
    assert report["step"]["quartiles_s"] == [report["step"]["median_s"]] * 3
    assert sum(r["flops"] for r in report["layers"]) == report["artifact"]["step_flops"]


def test_the_command_prints_for_people_and_writes_for_programs(artifact, tmp_path, capsys):
    out = tmp_path / "measured.json"
    command = ["measure", "--artifact", str(artifact.folder), "--threads", "1", "--steps", "2"]
    assert main([*command, "--json", str(out)]) == 0
    told = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["artifact"]["digest"] == artifact.digest
    for text in ("resnet8, batch 8, on ", "GFLOP/s of a matrix product", "foretold",
                 "blocks.0.conv2           backward",
                 f"signed    by {written['device']}"):  # fmt: skip
        assert text in told
    measurement.verify(out.read_bytes(), where="measured.json")


def test_a_device_signs_with_one_key_which_its_agents_user_owns(artifact, tmp_path, home, capsys):
    command = ["measure", "--artifact", str(artifact.folder), "--threads", "1", "--steps", "1"]
    outs = [tmp_path / f"{n}.json" for n in range(3)]
    assert main([*command, "--json", str(outs[0])]) == 0
    assert main([*command, "--json", str(outs[1])]) == 0
    settings = tmp_path / "agent.toml"
    settings.write_text('device = "pi"\nfleet = "home"\ndata = "x"\nstate = "state"\n'
                        '[broker]\nurl = "mqtt://127.0.0.1:9"\n')  # fmt: skip
    assert main([*command, "--config", str(settings), "--json", str(outs[2])]) == 0
    capsys.readouterr()
    first, second, other = (measurement.verify(o.read_bytes(), where=o.name) for o in outs)
    assert first.device == second.device != other.device
    assert (first.name, other.name) == ("", "pi")
    assert (home / "stillhouse" / identity.KEY).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state" / identity.KEY).exists()


def test_the_roofline_tells_what_bounds_a_layer_and_how_near_it_came(report, key):
    signed = measurement.sign(key, report)
    machine = measurement.Machine(gemm_gflops=100.0, copy_gbytes=10.0)
    near, far, none = (
        measurement.LayerTime(name, "forward", flops, moved, 0, seconds)
        for name, flops, moved, seconds in (
            ("near", 10**9, 10**7, 0.02),  # 100 FLOP/byte: 10 ms at the peak
            ("far", 10**7, 10**7, 0.01),  # 1 FLOP/byte: 1 ms of copying
            ("none", 0, 10**7, 0.001),
        )
    )
    assert [roofline.of_roof(row, machine) for row in (near, far, none)] == [0.5, 0.1, 1.0]
    lines = roofline.table(replace(signed, machine=machine, layers=(none, far, near)))
    assert [line.split()[0] for line in lines] == ["layer", "near", "far", "none"]
    assert lines[1].split()[5:] == ["100.00", "50.0", "100.0", "50", "%", "arithmetic"]
    assert lines[2].split()[5:] == ["1.00", "1.0", "10.0", "10", "%", "memory"]
    assert lines[3].split()[5:] == ["-", "-", "-", "100", "%", "memory"]


def test_the_picture_names_the_longest_layers_and_no_name_covers_another(report, key, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    annotate = Axes.annotate

    def watched(axes, *arguments, **more):
        drawn.append(annotate(axes, *arguments, **more))
        return drawn[-1]

    monkeypatch.setattr(Axes, "annotate", watched)
    signed = measurement.sign(key, report)
    with np.errstate(all="raise"):
        roofline.draw("/dev/null", signed)
    named = [text for text in drawn if text.axes is not None and text.arrow_patch is not None]
    assert len(named) == roofline.LABELLED
    longest = max((r for r in signed.layers if r.flops), key=lambda r: r.seconds)
    assert named[0].get_text().startswith(f"{longest.name} {longest.phase}")
    renderer = named[0].figure.canvas.get_renderer()
    boxes = [super(type(text), text).get_window_extent(renderer) for text in named]
    assert [box.count_overlaps(boxes) for box in boxes] == [1] * len(boxes)  # itself


@pytest.mark.e2e
@pytest.mark.parametrize("task", ["distill", "classify"])
def test_pytorch_does_the_same_step_in_a_process_of_its_own(task, tmp_path, monkeypatch, key):
    monkeypatch.setattr(peer, "TURN_S", 0.2)
    torch.manual_seed(0)
    out = tmp_path / "artifact"
    model = models.build("resnet8", classes=4, input_shape=(3, 16, 16))
    export(model, name="resnet8", classes=4, input_shape=(3, 16, 16), batch=8, task=task, out=out,
           micro_batches=2 if task == "classify" else 1)  # fmt: skip
    report = measure.measure(open_artifact(out), threads=1, steps=2, with_pytorch=True)
    told = measurement.sign(key, report).pytorch
    assert told.version == torch.__version__
    assert min(told.images_per_s, told.ours_images_per_s, told.ratio) > 0
    assert told.peak_bytes > 150e6  # PyTorch alone takes that
    assert "times; its process peaks at" in measure.text(measurement.sign(key, report))


def test_another_step_than_ours_is_not_compared(artifact):
    with pytest.raises(SettingsError, match="not the same step: expected a first loss near 99"):
        peer.race(artifact, lambda: 99.0, threads=1)


def test_without_pytorch_the_remedy_is_told(artifact, monkeypatch, capsys):
    monkeypatch.setattr(peer, "PACKAGES", ("torch_of_another_world",))
    assert main(["measure", "--artifact", str(artifact.folder), "--with-pytorch"]) == 2
    assert "torch_of_another_world cannot be found by" in capsys.readouterr().err


def test_without_matplotlib_the_terminal_tells_it(artifact, monkeypatch, capsys):
    monkeypatch.setattr(roofline.util, "find_spec", lambda _: None)
    command = ["measure", "--artifact", str(artifact.folder), "--roofline", "roof.png"]
    assert main(command) == 2
    assert "--roofline: matplotlib is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--artifact", "nowhere"], "nowhere/manifest.json: cannot be read"),
        (["--artifact", "nowhere", "--steps", "0"], "--steps of 1 or more"),
        (["--artifact", "nowhere", "--config", "no.toml"], "no.toml: cannot be read: No such file"),
        (["--artifact", "nowhere", "--submit"], "nowhere.toml is not there, or not for this user"),
        (["--artifact", "nowhere", "--json", "no/x.json"], "no/x.json: no is no folder; make it"),
        (["--artifact", "nowhere", "--json", "/"], "/ is a folder; name a file in it"),
        (["--artifact", "nowhere", "--roofline", "x.pdf"], "expected a name that ends in .png"),
        ([], "no training artifact is here: none in"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, text, capsys):
    assert main(["measure", *arguments]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_without_a_name_the_artifact_of_the_last_run_is_measured(artifact, tmp_path, capsys):
    settings = tmp_path / "agent.toml"
    settings.write_text(
        f'device = "pi-3"\nfleet = "home"\ndata = "images"\nstate = "{tmp_path}/state"\n'
        '[broker]\nurl = "mqtt://localhost:1883"\n'
    )
    command = ["measure", "--config", str(settings), "--threads", "1", "--steps", "1"]
    assert main(command) == 2
    assert f"nor in {tmp_path}/state/artifacts. One comes with a" in capsys.readouterr().err
    older, newer = (tmp_path / "state/artifacts" / name for name in ("older", artifact.digest))
    shutil.copytree(artifact.folder, newer)
    older.mkdir()
    (older / "manifest.json").write_text("{}")
    os.utime(older / "manifest.json", (1, 1))
    assert main([*command, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["artifact"]["digest"] == artifact.digest


def test_a_state_folder_of_another_user_is_said(artifact, monkeypatch, capsys):
    monkeypatch.setattr(identity.os, "access", lambda *_: False)
    assert main(["measure", "--artifact", str(artifact.folder)]) == 2
    assert "device.pem: no key can be read or made there" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="root's alone")
def test_root_keeps_no_key_where_a_link_of_the_agents_user_could_lead_it(tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 65534, 65534)
    settings = AgentConfig("pi", "home", tmp_path, state, BrokerAddress("mqtt://localhost"))
    with pytest.raises(SignatureError, match="is not root's; measure as the agent's user"):
        identity.key_file(settings)
    os.chown(state, 0, 0)
    assert identity.key_file(settings) == state / "device.pem"
