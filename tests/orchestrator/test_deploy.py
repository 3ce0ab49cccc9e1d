"""An exported file gives PyTorch's results for every form of pixels, and describes itself."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import models
from ondevice.images import Preprocess
from orchestrator import datasets
from orchestrator.config import (
    CohortConfig,
    DeviceConfig,
    Recipe,
    RunConfig,
    ServerConfig,
    SubmodelConfig,
)
from orchestrator.deploy import export, graph
from orchestrator.launch import artifacts
from orchestrator.main import app
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.simulation import simulate
from orchestrator.training import distill
from wire.errors import RunError

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("Null", "Eins", "Zwei", "Drei", "Vier", "Fünf", "Sechs", "Sieben", "Acht", "Neun")
PAGE = Path(__file__).parents[2] / "docs" / "in-use.md"
FORMS = ("float32", "uint8")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of handwritten digits: 2 devices with 32 images each, 40 images held out."""
    folder = tmp_path_factory.mktemp("few")
    datasets.build("digits", folder, devices=2, per_device=32, heldout_samples=40)
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory, few):
    """The same folder, with names of classes."""
    folder = tmp_path_factory.mktemp("named")
    for file in few.glob("*.npz"):
        with np.load(file) as arrays:
            np.savez(folder / file.name, **{**arrays, "classes": np.array(NAMES)})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, few, named):
    """The folders of runs of one round, one for each strategy."""
    device = DeviceConfig(
        model="resnet8", classes=NAMES, batch=16, lr=0.02, mean=(0.3, 0.2, 0.1), std=(0.4, 0.3, 0.5)
    )
    config = RunConfig(
        name="gkt",
        strategy="fedgkt",
        rounds=1,
        heldout=named / "heldout.npz",
        runs=tmp_path_factory.mktemp("runs"),
        cohort=CohortConfig(min_devices=2),
        device=device,
        server=ServerConfig(model="resnet10", epochs=1, batch=32, torch_device="cpu"),
    )
    for one in (config, replace(config, name="local", strategy="local")):
        simulate.run(one, named)
    numbered = replace(
        config,
        heldout=few / "heldout.npz",
        device=replace(device, model="caldas_cnn", classes=10),
    )
    for one in (
        replace(numbered, name="avg", strategy="fedavg"),
        replace(
            numbered,
            name="dropout",
            strategy="feddropout",
            submodel=SubmodelConfig(keep_rate=0.5),
        ),
    ):
        simulate.run(one, few)
    return config.runs


@pytest.fixture(scope="module")
def exported(runs):
    """Both forms of the global network of a fedavg run."""
    return {
        form: export.export_run(runs / "avg", runs / f"{form}.onnx", form=form) for form in FORMS
    }


@pytest.fixture(scope="module")
def held(few):
    """Pixels and labels of the held-out images."""
    with np.load(few / "heldout.npz") as arrays:
        return arrays["x"], arrays["y"]


@pytest.fixture(scope="module")
def pixels(held):
    return held[0]


def planes(pixels):
    """The pixels as float32 (N, C, H, W) from 0 to 1."""
    return pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255


def ask(path, image):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image})[0]


def in_pytorch(folder, pixels):
    """Logits of a run's global network in PyTorch, for images normalized as agents do it."""
    config = export.read_config(folder)
    _, state = last_checkpoint(folder)
    device = config.device
    network = models.build(device.model, classes=device.class_count, input_shape=device.input)
    x = np.empty((len(pixels), *device.input), np.float32)
    Preprocess(device.mean, device.std)(pixels, out=x)
    with torch.inference_mode():
        return distill.load(network, state.under("global")).eval()(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ["gkt", "gkt --small", "local --small", "avg", "dropout"])
def test_every_strategy_is_exported_in_each_form(runs, tmp_path, held, which, form):
    run, _, small = which.partition(" ")
    done = export.export_run(runs / run, tmp_path / "m.onnx", small=bool(small), form=form)
    assert done.difference < 1e-4
    pixels, labels = held
    answers = ask(done.path, pixels if form == "uint8" else planes(pixels))
    right = (answers.argmax(axis=1) == labels).mean()
    assert done.card.accuracy == pytest.approx(right, abs=0.026)
    assert done.card.classes == (NAMES if run in ("gkt", "local") else tuple("0123456789"))


def test_each_form_answers_as_pytorch_does_for_any_number_of_images(runs, exported, pixels):
    for count in (1, 2, 40):
        some = pixels[:count]
        expected = in_pytorch(runs / "avg", some)
        for image, form in (
            (some, "uint8"),
            (planes(some), "float32"),
            (planes(some) * 255, "float32"),
        ):
            np.testing.assert_allclose(ask(exported[form].path, image), expected, atol=1e-4)


def test_each_image_is_taken_for_what_it_is_among_others(exported, pixels):
    plain = planes(pixels[:4])
    mixed = plain.copy()
    mixed[1::2] *= 255
    path = exported["float32"].path
    np.testing.assert_allclose(ask(path, mixed), ask(path, plain), atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x - 0.4) / 0.2,  # normalized
        lambda x: 2 * x - 1,
        lambda x: x * 65535,
        lambda x: np.where(x > 0.5, np.nan, x),
        lambda x: -x,
        lambda x: x * np.inf,
    ],
    ids=["normalized", "symmetric", "16 bits", "nan", "negative", "inf"],
)
def test_what_is_no_pixels_is_refused_though_one_image_of_many_is_so(exported, pixels, change):
    image = planes(pixels[:5])
    assert image.max() == 1
    with np.errstate(invalid="ignore"):
        image[2] = change(image[2])
    with pytest.raises(Exception, match="expected pixels from 0 to 1, or from 0 to 255"):
        ask(exported["float32"].path, image)


@pytest.mark.parametrize("scale", [1, 255])
def test_pixels_that_interpolation_made_are_taken_as_they_are(exported, pixels, scale):
    """Bicubic and Lanczos interpolation overshoot the range by less than a fifth."""
    image = planes(pixels[:3]) * 1.38 - 0.19
    answers = ask(exported["float32"].path, image * np.float32(scale))
    np.testing.assert_allclose(answers, ask(exported["float32"].path, image), atol=1e-3)
    assert not np.allclose(answers, ask(exported["float32"].path, planes(pixels[:3])), atol=1e-3)


@pytest.mark.parametrize(
    ("form", "image"),
    [
        ("uint8", np.zeros((1, 3, 32, 32), np.uint8)),
        ("uint8", np.zeros((1, 32, 32, 3), np.float32)),
        ("float32", np.zeros((1, 32, 32, 3), np.float32)),
        ("float32", np.zeros((1, 3, 32, 32), np.uint8)),
    ],
)
def test_another_layout_or_type_is_refused(exported, form, image):
    with pytest.raises(Exception, match=r"Got invalid dimensions|Unexpected input data type"):
        ask(exported[form].path, image)


def test_the_file_says_what_it_is(runs, tmp_path):
    """The keys are a promise to other programs: docs/in-use.md."""
    done = export.export_run(runs / "gkt", tmp_path / "m.onnx", "device-1", form="uint8")
    session = onnxruntime.InferenceSession(done.path)
    about = session.get_modelmeta().custom_metadata_map
    assert float(about.pop("stillhouse.accuracy")) == done.card.accuracy
    assert about == {
        "stillhouse.format": "1",
        "stillhouse.classes": json.dumps(NAMES, ensure_ascii=False),
        "stillhouse.input": "uint8",
        "stillhouse.layout": "NHWC",
        "stillhouse.channels": "3",
        "stillhouse.size": "[32, 32]",
        "stillhouse.resize": '{"filter": "bilinear", "antialias": true, "keep_aspect_ratio": false,'
        ' "upright": "exif", "jpeg_draft": 2}',
        "stillhouse.scale": "255.0",
        "stillhouse.mean": "[0.3, 0.2, 0.1]",
        "stillhouse.std": "[0.4, 0.3, 0.5]",
        "stillhouse.version": "0.1.0",
        "stillhouse.run": "gkt",
        "stillhouse.strategy": "fedgkt",
        "stillhouse.round": "1",
        "stillhouse.device": "device-1",
        "stillhouse.model": "resnet10 on the extractor of resnet8",
    }
    table = PAGE.read_text().partition("| key |")[2].partition("\n\n")[0]
    told = set(re.findall(r"`([a-z]+)`", "\n".join(row[:30] for row in table.splitlines())))
    assert {key.removeprefix("stillhouse.") for key in about} | {"accuracy"} <= told


def test_names_and_normalization_are_those_that_devices_train_by(runs, tmp_path):
    """They come from the artifact's manifest; run.json may hold less."""
    config = export.read_config(runs / "avg")
    trained = replace(config.device, classes=NAMES, mean=(0.5,) * 3, std=(0.25,) * 3)
    trained = replace(config, device=trained)
    artifacts._artifact(trained, tmp_path / "artifact", Recipe("caldas_cnn"))
    for name in ("run.json", "status.json", "checkpoints"):
        (tmp_path / name).symlink_to(runs / "avg" / name)
    card = export.export_run(tmp_path, tmp_path / "m.onnx").card
    assert (card.classes, card.mean, card.std) == (NAMES, (0.5,) * 3, (0.25,) * 3)


def test_the_accuracy_of_another_round_is_not_told(runs, tmp_path):
    for name in ("run.json", "checkpoints"):
        (tmp_path / name).symlink_to(runs / "avg" / name)
    status = json.loads((runs / "avg/status.json").read_text())
    status["history"][0]["round"] = 7
    (tmp_path / "status.json").write_text(json.dumps(status))
    done = export.export_run(tmp_path, tmp_path / "m.onnx")
    assert done.card.accuracy is None
    about = onnxruntime.InferenceSession(done.path).get_modelmeta().custom_metadata_map
    assert "stillhouse.accuracy" not in about


def test_any_onnxruntime_that_is_allowed_runs_the_file(exported):
    """1.20 supports opset 21 and IR 10; no operator is a runtime's extension."""
    for done in exported.values():
        proto = onnx.load(done.path)
        assert proto.ir_version <= 9
        assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
        assert not proto.functions
        onnx.checker.check_model(proto, full_check=True)


def test_the_file_tells_nothing_of_the_machine_that_wrote_it(exported):
    for done in exported.values():
        content = done.path.read_bytes()
        assert b".py" not in content
        assert os.fsencode(Path(export.__file__).parent) not in content


class Undecided(nn.Module):
    """A network whose Python code branches on values, which no graph can hold."""

    def forward(self, x):
        return x.flatten(1)[:, :10] if x.sum() > 0 else x.flatten(1)[:, 10:20]


def test_a_network_that_pytorch_cannot_export_is_named(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "_parts", lambda *_, **__: ([Undecided()], "mine:make"))
    with pytest.raises(RunError, match="PyTorch cannot export mine:make"):
        export.export_run(runs / "avg", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_differs_from_pytorch_is_not_written(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(graph, "_UINT8", graph._UINT8.replace("{{255}}", "{{256}}"))
    with pytest.raises(RunError, match=r"differs from PyTorch by 0\.\d+; not written"):
        export.export_run(runs / "avg", tmp_path / "m.onnx", form="uint8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("nowhere/m.onnx", r"m\.onnx: .*nowhere is no folder; make it"),
        ("", r"is a folder; name a file in it, such as .*model\.onnx"),
        ("photo.jpg", r"photo\.jpg is there and is no \.onnx file"),
        ("x" * 300 + ".onnx", "File name too long; name another file"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_work_begins(
    runs, tmp_path, monkeypatch, out, text
):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    monkeypatch.setattr(graph, "build", lambda *_: pytest.fail("it began"))
    with pytest.raises(RunError, match=text):
        export.export_run(runs / "avg", tmp_path / out)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


def test_a_full_disk_leaves_the_earlier_file(runs, tmp_path, monkeypatch):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"before")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); make room"):
        export.export_run(runs / "avg", out)
    monkeypatch.undo()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize("option", ["--small", "--device"])
def test_an_option_that_the_strategy_has_no_use_for_is_refused(runs, tmp_path, option):
    chosen = {"small": True} if option == "--small" else {"device": "device-0"}
    with pytest.raises(RunError, match=f"fedavg has one model for all; export without {option}"):
        export.export_run(runs / "avg", tmp_path / "m.onnx", **chosen)


def test_a_damaged_run_is_named(tmp_path):
    for content in ("[]", "3", "no"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RunError, match=r"holds no run: run\.json cannot be read"):
            export.export_run(tmp_path, tmp_path / "m.onnx")


def test_the_command_says_what_it_wrote(runs, tmp_path):
    arguments = ["export", str(runs / "gkt"), "--out", str(tmp_path / "m.onnx")]
    first = CliRunner().invoke(app, [*arguments, "--input", "uint8"])
    assert "m.onnx written: round 1, resnet10 on the extractor of resnet8 (device-" in first.output
    assert "it takes `image`, uint8 (N, 32, 32, 3)" in first.output
    second = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert second["replaced"]
    assert second["input"] == "float32"
    assert second["classes"] == list(NAMES)
    assert second["path"] == str(tmp_path / "m.onnx")


@pytest.mark.parametrize("form", FORMS)
def test_the_example_in_the_docs_answers_as_predict_does(exported, tmp_path, pixels, form):
    exif = Image.Exif()
    exif[0x112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels[3]).resize((1600, 1200)).save(tmp_path / "photo.jpg", exif=exif)
    (tmp_path / "model.onnx").symlink_to(exported[form].path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    if form == "float32":
        (other,) = re.findall(r"takes `(pixels\.[^`]+)`", PAGE.read_text())
        block = block.replace("pixels[None]", other)
    (tmp_path / "example.py").write_text(block)
    told = [
        subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(PAGE.parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for command in (
            ["example.py"],
            ["-m", "orchestrator.main", "predict", "model.onnx", "photo.jpg"],
            ["-m", "edge_agent.main", "predict", "model.onnx", "photo.jpg"],
        )
    ]
    assert told[0] == told[1] == told[2]
    assert re.fullmatch(r"photo\.jpg  \d \d+\.\d %\n", told[0])
