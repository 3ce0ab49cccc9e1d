"""A run's networks are tried before anything begins, and may not change during the run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import models
from orchestrator import strategies
from orchestrator.config import (
    CohortConfig,
    DeviceConfig,
    Other,
    RunConfig,
    ServerConfig,
    SubmodelConfig,
    TransferConfig,
    load,
)
from orchestrator.deploy import export
from orchestrator.launch import artifacts, networks, start
from orchestrator.main import app
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.simulation import simulate
from tools.pytorch_step import prepare as pytorch_step
from wire.artifact import open_artifact
from wire.errors import RunError, SettingsError, StillhouseError

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
from torch import nn

def block(i, o, stride=1):
    return nn.Sequential(
        nn.Conv2d(i, o, 3, stride, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
    )

class Small(nn.Module):
    def __init__(self, classes, width=6):
        super().__init__()
        self.stem, self.body = block(3, 6), block(6, width, 2)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))

class Other(Small):
    def __init__(self, classes):
        super().__init__(classes, width=4)

class Dropping(Small):
    def __init__(self, classes):
        super().__init__(classes)
        self.fc = nn.Sequential(nn.Dropout(0.5), self.fc)

def large(classes, input_shape):
    return nn.Sequential(block(input_shape[0], 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, classes))
"""

RUN = """
name = "run"
strategy = "{strategy}"
rounds = 2
heldout = "{digits}/heldout.npz"
[broker]
kind = "external"
url = "mqtt://127.0.0.1:1"
[cohort]
min_devices = 3
[device]
model = "nets.py:Small"
{split}
batch = 16
lr = 0.02
mean = [0.3, 0.3, 0.3]
std = [0.37, 0.37, 0.37]
{more}
[server]
model = "nets.py:large"
batch = 32
epochs = 1
torch_device = "cpu"
"""


@pytest.fixture
def run(tmp_path, digits, monkeypatch):
    """The configuration of a run.toml beside the user's nets.py, read from another folder."""
    (tmp_path / "job").mkdir()
    (tmp_path / "job/nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)

    def make(strategy="fedgkt", split='split = "stem"', more=""):
        path = tmp_path / "job/run.toml"
        path.write_text(RUN.format(digits=digits, strategy=strategy, split=split, more=more))
        return load(path, strategies.check)

    return make


def others(split):
    return f'[[device.others]]\nmodel = "nets.py:Other"\nsplit = "{split}"\ndevices = "*-1"'


@pytest.mark.parametrize(
    ("strategy", "split", "more"),
    [
        ("fedgkt", 'split = "stem"', others("stem.2")),
        ("fedavg", "", ""),
        ("feddropout", "", "[submodel]\nkeep_rate = 0.5"),
        ("local", 'split = "stem"', ""),
    ],
)
def test_every_strategy_trains_a_users_network_and_exports_it(run, digits, strategy, split, more):
    config = run(strategy, split, more)
    report = simulate.run(config, digits)
    assert len(report.entries) == 2
    whole = json.loads((config.folder / "report.json").read_text())
    assert set(whole["sources"]["nets.py:Small"]) == {"nets.py"}
    assert ("nets.py:large" in whole["sources"]) == (strategy == "fedgkt")
    out = config.folder / "model.onnx"
    done = export.export_run(config.folder, out, small=strategy == "local")
    assert done.difference < 1e-3
    assert whole["config"]["device"]["model"] == "nets.py:Small"  # without local folders
    if strategy == "fedgkt":
        assert done.card.model == "nets:large on the extractor of nets:Small@stem"
        small = export.export_run(config.folder, out, "device-1", small=True)
        assert (small.card.device, small.card.model) == ("device-1", "nets:Other@stem.2")
    else:
        assert done.card.model == f"nets:Small{'@stem' if split else ''}"


def test_devices_that_share_their_network_go_on_where_the_folder_was_moved(run, digits, tmp_path):
    more = '[transfer]\nextractor = "shared"\nnetwork = "shared"'
    config = run(more=others("stem") + "\n" + more)
    simulate.run(replace(config, rounds=1), digits)
    moved = tmp_path / "moved"
    (tmp_path / "job").rename(moved)
    config = load(moved / "run.toml")
    assert len(simulate.run(config, digits).entries) == 2
    _, state = last_checkpoint(config.folder)
    assert {key for key in state.tensors if key.startswith("network/nets.py:Other@stem/")}


def test_a_source_that_changed_stops_a_run_that_was_begun(run, digits):
    config = run()
    simulate.run(replace(config, rounds=1), digits)
    source = config.folder.parents[1] / "nets.py"
    source.write_text(NETS + "\n# another line\n")
    code = f"""
import sys
from pathlib import Path
from orchestrator.deploy import export
from orchestrator.simulation import simulate
from orchestrator.config import load
from wire.errors import RunError
for go_on in (
    lambda: simulate.run(load(Path({str(source.parent / "run.toml")!r})), Path({str(digits)!r})),
    lambda: export.export_run(Path({str(config.folder)!r}), Path("m.onnx")),
):
    try:
        go_on()
    except RunError as fault:
        print(fault)
"""
    from tests.models.test_foreign import run as run_code

    for said in run_code(source.parent, code).stdout.splitlines():
        assert said == (
            "nets.py:Small: nets.py changed since run run was begun; restore it, or choose "
            "another name for a new run. If the network or strategy is the same as before, remove "
            f"{config.folder / 'sources.json'}"
        )
    (config.folder / "sources.json").unlink()
    assert len(simulate.run(config, digits).entries) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": {"model": "nets.py:Smal"}}, "device.model: nets.py:Smal: .*mean 'Small'"),
        ({"device": {"model": "nest.py:Small"}}, "device.model: nest.py:Small: no file"),
        ({"device": {"split": ""}}, ('nets:Small has no feature extractor, which fedgkt needs; set '
         r'split = "stem\.0" .*command line nets\.py:Small@stem\.0\), or another of '
         r".*'stem', .*Or use strategy fedavg")),
        ({"device": {"split": "fc"}}, 'device.model: nets:Small: split = "fc": its output is'),
        ({"device": {"others": (Other("nets.py:Other", "*-1", "body"),)}},
         "feature maps of the device models differ"),
        ({"device": {"others": (Other("nets.py:Other", "*-1"),)}}, "device.others: nets:Other has"),
        ({"server": {"model": "nets.py:Small"}}, (r"server.model: nets:Small fails on images of "
         r"shape \(6, 32, 32\), in module 'stem.0' \(Conv2d\)")),
        ({"transfer": TransferConfig(views=True, freeze_after=1), "device": {"split": "body"}},
         "transfer.views: feature maps of 16 x 16 are not crops of images"),
        ({"device": {"model": "nets.py:Dropping"}}, "nets:Dropping@stem: .*set p=0"),
        ({"device": {"model": "resnet8", "split": "", "batch": 1}, "server": {"model": "resnet10"}},
         "resnet8: .*batch norm; with a batch of 1"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_run_is_told_before_a_folder_is_made(run, digits, changes, reason):
    config = run()
    for key, value in changes.items():
        part = value
        if isinstance(value, dict):
            part = replace(getattr(config, key), **{k: placed(config, v) for k, v in value.items()})
        config = replace(config, **{key: part})
    for begin in (lambda: simulate.run(config, digits), lambda: start.run(config)):
        with pytest.raises(StillhouseError, match=reason):
            begin()
    assert not config.runs.exists()


def test_a_simulation_that_has_begun_goes_on_without_compiling_again(run, digits, monkeypatch):
    config = run("local")
    simulate.run(replace(config, rounds=1), digits)
    monkeypatch.setattr(artifacts, "compiled", None)
    assert len(simulate.run(config, digits).entries) == 2


def test_a_simulation_without_onnx_says_that_nothing_was_compiled(run, digits, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "orchestrator.launch.artifacts", None)
    simulate.run(replace(run("local"), rounds=1), digits)
    assert "whether the networks can be compiled for devices is not checked" in caplog.text


def placed(config, value):
    """A setting as `load` makes it from run.toml's value."""
    if isinstance(value, tuple):
        return tuple(replace(other, model=placed(config, other.model)) for other in value)
    is_name = isinstance(value, str) and ":" in value
    return f"{config.folder.parents[1]}/./{value}" if is_name else value


def test_crops_of_feature_maps_that_see_the_whole_image_are_refused(run, tmp_path):
    (tmp_path / "job/nets.py").write_text(
        NETS + "\nclass Small(Small):\n    def __init__(self, classes):\n"
        "        super().__init__(classes)\n"
        "        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6))\n"
    )
    config = replace(run(), transfer=TransferConfig(views=True, freeze_after=1))
    with pytest.raises(RunError, match="feature maps of nets:Small@stem are not crops where"):
        networks.check(config)


def test_a_large_model_that_takes_no_small_crops_is_refused(run, tmp_path):
    (tmp_path / "job/nets.py").write_text(
        NETS + "\ndef flat(classes, input_shape):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))\n"
    )
    config = replace(run(), transfer=TransferConfig(views=True, freeze_after=1))
    server = replace(config.server, small_crops=0.5)
    networks.check(replace(config, server=server))
    server = replace(server, model=placed(config, "nets.py:flat"))
    networks.check(replace(config, server=replace(server, small_crops=0.0)))
    with pytest.raises(RunError, match=r"small_crops: nets:flat does not take crops of 24 x 24;"):
        networks.check(replace(config, server=server))


def test_a_tensor_of_two_names_is_refused_where_a_run_begins(run, tmp_path):
    (tmp_path / "job/nets.py").write_text(
        NETS + "\ndef tied(classes):\n    net = Small(classes, width=3)\n"
        "    net.stem, net.body = block(3, 3), block(3, 3, 2)\n"
        "    net.body[0].weight = net.stem[0].weight\n    return net\n"
    )
    config = run("fedavg", "")
    device = replace(config.device, model=config.device.model.replace(":Small", ":tied"))
    with pytest.raises(
        RunError, match=r"nets:tied: 'stem\.0\.weight' and 'body\.0\.weight' are one tensor"
    ):
        networks.check(replace(config, device=device))


def test_weights_that_do_not_follow_the_seed_are_refused(run, tmp_path):
    (tmp_path / "job/nets.py").write_text(
        NETS + "\nimport secrets, torch\ndef make(classes):\n    net = Small(classes)\n"
        "    net.fc.bias.data[0] = secrets.randbelow(10**6)\n    return net\n"
    )
    config = run("fedavg", "")
    device = replace(config.device, model=config.device.model.replace(":Small", ":make"))
    with pytest.raises(RunError, match=r"nets:make: 'fc.bias' is another one in each network"):
        networks.check(replace(config, device=device))


def test_a_split_is_for_feature_maps(run):
    with pytest.raises(SettingsError, match=r"device\.split: strategy 'fedavg' sends no feature"):
        run("fedavg")


def test_the_artifact_has_a_short_name_and_pytorch_finds_its_network(run, tmp_path):
    from orchestrator.run_folder.store import Store

    config = run(more=others("stem"))
    store = Store(config)
    try:
        artifacts.prepare_variants(config, store)
        folders = {path.name for path in store.folder.glob("artifact*")}
        manifests = [open_artifact(store.folder / name).manifest for name in sorted(folders)]
    finally:
        store.close()
    assert [m.model.name for m in manifests] == ["nets:Small@stem", "nets:Other@stem"]
    assert folders == {"artifact", "artifact-nets-Other-stem-" + next(
        name for name in folders if name != "artifact").rpartition("-")[2]}  # fmt: skip
    folder = config.folder / "artifact"
    name = f"{tmp_path}/job/nets.py:Small@stem"
    _, loss = pytorch_step(folder, 1, name)
    assert np.isfinite(loss)
    with pytest.raises(StillhouseError, match="name where it is with --model"):
        pytorch_step(folder, 1)
    with pytest.raises(StillhouseError, match="resnet8 is not the artifact's network"):
        pytorch_step(folder, 1, "resnet8")


def test_a_demo_of_a_network_that_does_not_fit_leaves_nothing_behind(run, tmp_path):
    run()
    demo = ("demo", "--devices", "2", "--samples", "8", "--heldout-samples", "8")
    for model, reason in (("job/nets.py:Small", "has no feature extractor"),
                          ("job/nets.py:Smal", "did you mean 'Small'")):  # fmt: skip
        with pytest.raises(StillhouseError, match=reason):
            CliRunner().invoke(app, [*demo, "--model", model], catch_exceptions=False)
        assert not (tmp_path / "runs").exists()


def test_a_run_of_ours_is_tried_too(tmp_path, digits):
    config = RunConfig(
        name="run", heldout=digits / "heldout.npz", runs=tmp_path / "runs",
        cohort=CohortConfig(min_devices=3), device=DeviceConfig(model="caldas_cnn", split="conv1"),
        server=ServerConfig(model="resnet10"), submodel=SubmodelConfig(),
    )  # fmt: skip
    assert networks.check(config) == {}
    with pytest.raises(StillhouseError, match="'conv1', 'conv2'"):
        networks.check(replace(config, device=replace(config.device, split="")))
    assert models.build("caldas_cnn@conv1", classes=3).rest.conv2


def test_ranks_build_the_server_by_its_name(run):
    config = run()
    assert Path(config.server.model.partition("/./")[0]) == config.folder.parents[1]
    assert models.build(config.server.model, classes=3, input_shape=(6, 8, 8))[3].out_features == 3


@pytest.mark.parametrize("content", ["", "[]", '{"nets.py:Small": 1}'])
def test_a_damaged_list_of_sources_is_named(tmp_path, content):
    (tmp_path / networks.FILE).write_text(content)
    with pytest.raises(RunError, match=r"sources.json is damaged.* restore it"):
        networks.claim(tmp_path, {"nets.py:Small": {"nets.py": "ab"}})
