"""Photos are classified by an exported file, or by the network that the device trained last."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import parser
from PIL import Image
from safetensors.numpy import load_file

import models
from edge_agent import main
from edge_agent.journal import Journal
from edge_agent.kept import Kept
from edge_agent.own_network import OwnNetwork
from ondevice import predict
from ondevice.card import ModelCard
from ondevice.images import ImageSet, Preprocess, load
from ondevice.photos import picture
from ondevice.predict import Exported
from ondevice.work import Desk, perform
from orchestrator.training import distill
from tools.export import export
from wire.blobs import BlobStore
from wire.errors import ArtifactError, StillhouseError
from wire.messages import BlobRef, Order, Result

CARD = ModelCard(
    classes=("red", "grün", "blue"), input="uint8", layout="NHWC", channels=3, size=(4, 6),
    scale=255.0, mean=(0.5,) * 3, std=(0.5,) * 3, run="run", strategy="fedavg", round=3,
    model="mine", version="0.1.0",
)  # fmt: skip
# Logits are the means of the colours, from 0 to 10.
GRAPHS = {
    "uint8": """<ir_version: 9, opset_import: ["" : 18]>
    g (uint8[N, 4, 6, 3] image) => (float[N, 3] logits) <int64[2] axes = {1, 2}, float k = {25.5}> {
        x = Cast <to = 1> (image)
        means = ReduceMean <keepdims = 0> (x, axes)
        logits = Div (means, k)
    }""",
    "float32": """<ir_version: 9, opset_import: ["" : 18]>
    g (float[N, 3, 4, 6] image) => (float[N, 3] logits) <int64[2] axes = {2, 3}, float k = {0.1}> {
        means = ReduceMean <keepdims = 0> (image, axes)
        logits = Div (means, k)
    }""",
}
COLOURS = {"a.png": (255, 0, 0), "b.jpg": (0, 255, 0), "c.webp": (0, 0, 255)}


def write(path, metadata, graph="uint8"):
    proto = parser.parse_model(GRAPHS[graph])
    onnx.helper.set_model_props(proto, metadata)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model.onnx", CARD.metadata)


@pytest.fixture
def photos(tmp_path):
    """A folder with a red, a green and a blue photo, and with files that are not photos."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name, colour in COLOURS.items():
        inner = folder / ("sub" if name == "b.jpg" else ".")
        Image.new("RGB", (40, 30), colour).save(inner / name)
    Image.new("RGB", (40, 30)).save(folder / ".hidden" / "d.png")
    Image.new("RGB", (40, 30)).save(folder / ".e.png")
    (folder / "notes.txt").write_text("none")
    return folder


@pytest.mark.parametrize("form", ["uint8", "float32"])
def test_the_likeliest_classes_are_named_with_their_probabilities(tmp_path, photos, form, capsys):
    card = CARD
    if form == "float32":
        card = replace(CARD, input="float32", layout="NCHW", scale=1.0)
    path = write(tmp_path / "model.onnx", card.metadata, form)
    assert main.main(["predict", str(path), str(photos), "--top", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [
        str(photos / "a.png"), str(photos / "c.webp"), str(photos / "sub" / "b.jpg"),
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["red", "blue", "grün"]
    sure = 100 / (1 + 2 * np.exp(-10))
    assert all(float(row[2]) == pytest.approx(sure, abs=0.1) for row in rows)
    assert all(row[3] == "%" and len(row) == 7 for row in rows)


def test_options_may_stand_anywhere(model, photos, capsys):
    red, blue = photos / "a.png", photos / "c.webp"
    assert main.main(["predict", str(model), str(red), "--top", "1", str(blue)]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["red", "blue"]
    with pytest.raises(SystemExit) as ended:
        main.main(["predict", str(model), "--tip", "1", str(blue)])
    assert ended.value.code == 2
    assert "unrecognized arguments: --tip" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_fault(model, photos):
    far, near = os.pipe()
    os.close(far)
    try:
        command = [sys.executable, "-m", "edge_agent.main", "predict", str(model), str(photos)]
        ended = subprocess.run(command, stdout=near, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(near)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_a_photo_that_cannot_be_read_is_named_and_the_others_are_answered(
    model, photos, tmp_path, capsys
):
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    (tmp_path / "none").mkdir()
    odd = [photos / "gone.png", tmp_path / "none", photos / ("x" * 300)]
    assert main.main(["predict", str(model), str(photos), *map(str, odd)]) == 1
    shown = capsys.readouterr()
    assert [line.split()[1] for line in shown.out.splitlines()] == ["red", "blue", "grün"]
    bad, *others = shown.err.splitlines()
    assert bad.startswith(f"{photos / 'bad.jpg'}: ")
    remedy = "check the name, and who may read it"
    kinds = " ".join(picture.suffixes())
    assert others == [
        f"{odd[0]}: cannot be read (No such file or directory); {remedy}",
        f"{odd[1]}: expected pictures ({kinds}), got a folder without any; name another",
        f"{odd[2]}: cannot be read (File name too long); {remedy}",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_this_user_may_not_enter_is_named(model, photos, capsys):
    (photos / "sub").chmod(0)
    assert main.main(["predict", str(model), str(photos)]) == 1
    (photos / "sub").chmod(0o700)
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2
    assert shown.err.startswith(f"{photos / 'sub'}: cannot be read (Permission denied)")


def test_json_has_what_a_script_needs(model, photos, capsys):
    (photos / "bad.jpg").write_bytes(b"")
    assert main.main(["predict", str(model), str(photos), "--json", "--top", "9"]) == 1
    shown = capsys.readouterr()
    first, bad, *_ = found = json.loads(shown.out)
    assert not shown.err
    assert len(found) == 4
    assert first["photo"] == str(photos / "a.png")
    assert [c["name"] for c in first["classes"]] == ["red", "grün", "blue"]
    assert sum(c["probability"] for c in first["classes"]) == pytest.approx(1)
    assert set(bad) == {"photo", "error"}


def test_a_name_that_is_no_utf_8_is_no_fault(model, photos, capsys):
    odd = os.fsencode(photos) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((photos / "a.png").read_bytes())
    assert main.main(["predict", str(model), os.fsdecode(odd)]) == 0
    assert main.main(["predict", str(model), os.fsdecode(odd), "--json"]) == 0
    assert "\\udce9" in capsys.readouterr().out


class Recorder:
    """A network that records its inputs."""

    classes, batch = ("a", "b"), 2

    def __init__(self, shape):
        self.shape, self.seen = shape, []

    def __call__(self, pixels):
        self.seen.append(pixels)
        return np.zeros((len(pixels), 2), np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_photos_are_read_as_training_images_are(tmp_path, channels):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x112] = 6
    folder = tmp_path / "images" / "only"
    folder.mkdir(parents=True)
    pixels = rng.integers(0, 256, (300, 400, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg", exif=exif)
    Image.fromarray(pixels[..., 0]).save(folder / "b.png")
    Image.fromarray(pixels).convert("P").save(folder / "c.png")
    Image.fromarray(pixels[:9, :7]).save(folder / "d.webp")
    trained = load(tmp_path / "images", input_shape=(channels, 20, 24))
    network = Recorder((channels, 20, 24))
    assert predict.report(network, [folder], top=1, as_json=False) == 0
    assert [len(some) for some in network.seen] == [2, 2]
    assert np.array_equal(np.concatenate(network.seen), trained.x)


def changed(**texts):
    return {**CARD.metadata, **{f"stillhouse.{key}": text for key, text in texts.items()}}


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "got an ONNX file without them; export the run with this version: orchestrator"),
        ({"mine.classes": '["a", "b"]'}, "got an ONNX file without them"),
        (changed(format="2"), "metadata of format 1, got '2'; update Stillhouse here"),
        (changed(classes="[a"), "metadata are damaged"),
        (changed(classes="[1, 2, 3]"), r"classes\[0\]: expected str, got int 1"),
        (changed(classes='["a", "b"]'), r"expected logits \[1, 2\] by its metadata, got \[1, 3\]"),
        (changed(size="[4, 7]"), "does not take what its metadata say .*Got invalid dimensions"),
        (changed(layout="NWHC"), "layout: expected one of 'NCHW', 'NHWC', got 'NWHC'"),
        (changed(classes='["a", "b", "\\u001b[31m"]'), "a printable name of each class, got '.x1b"),
        (changed(size="[0, 7]"), "expected channels, a size and classes"),
        (changed(channels="4"), r"grey images or RGB, \(1, H, W\) or \(3, H, W\), got one for \(4"),
        ({k: v for k, v in CARD.metadata.items() if "mean" not in k}, "key 'mean' is missing"),
    ],
)
def test_a_file_that_does_not_say_how_it_is_asked_is_refused(tmp_path, photos, metadata, text):
    path = write(tmp_path / "other.onnx", metadata)
    with pytest.raises(ArtifactError, match=rf"other\.onnx: .*{text}"):
        predict.report(Exported(path), [photos], top=1, as_json=False)


def test_names_may_hold_what_joins_letters_and_emoji(tmp_path):
    names = ("\N{WOMAN}\u200d\N{PERSONAL COMPUTER}", *CARD.classes[1:])
    about = replace(CARD, classes=names)
    assert predict.Exported(write(tmp_path / "model.onnx", about.metadata)).classes == names


def test_a_key_that_a_later_version_adds_is_passed_over(tmp_path, photos):
    path = write(tmp_path / "model.onnx", changed(energy="7"))
    assert predict.report(Exported(path), [photos], top=1, as_json=False) == 0


def test_what_is_no_onnx_file_is_named(photos, tmp_path, capfd):
    for wrong, text in [
        (photos / "a.png", "expected an .onnx file, got one that onnxruntime"),
        (photos, "expected an .onnx file, got a folder"),
        (tmp_path / "gone.onnx", "cannot be read (No such file or directory)"),
        (tmp_path / "empty.onnx", "expected an .onnx file, got one that onnxruntime"),
    ]:
        (tmp_path / "empty.onnx").touch()
        assert main.main(["predict", str(wrong), str(photos)]) == 2
        shown = capfd.readouterr().err
        assert shown.startswith(f"edge-agent: {wrong}: {text}")
        assert len(shown.splitlines()) == 1
        assert "orchestrator export RUN --out model.onnx" in shown
    assert main.main(["predict", str(photos / "a.png")]) == 2
    assert "expected a model and photos" in capfd.readouterr().err


@pytest.mark.parametrize("top", ["0", "-1"])
def test_no_classes_are_not_asked_for(model, photos, capsys, top):
    assert main.main(["predict", str(model), str(photos), "--top", top]) == 2
    assert f"--top: expected 1 or more classes, got {top}" in capsys.readouterr().err


SETTINGS = """
device = "device-0"
fleet = "fleet"
data = "images"
state = "state"
threads = 1
[broker]
url = "mqtt://localhost:1883"
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(1)
    return export(
        models.build("resnet8", classes=3), name="resnet8", classes=3, class_names=CARD.classes,
        input_shape=(3, 32, 32), batch=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3),
        out=tmp_path_factory.mktemp("artifact") / "a",
    )  # fmt: skip


@pytest.fixture
def device(tmp_path, artifact):
    """A device that has trained: its agent.toml, and its weights."""
    state = tmp_path / "state"
    (state / "artifacts").mkdir(parents=True)
    (state / "artifacts" / artifact.digest).symlink_to(artifact.folder)
    (tmp_path / "agent.toml").write_text(SETTINGS)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
    images = ImageSet(pixels, rng.integers(0, 3, 8), "cd" * 32)
    blobs = BlobStore(state / "blobs")
    desk = Desk(images, blobs, 1, lambda *_: None, threading.Event())
    journal = Journal(state / "journal.db")
    for run, seed in (("new", 1), ("old", 2), ("new", 3)):  # it trained in "new" last
        ref = BlobRef(artifact.digest, 1, 1024)
        order = Order(run, seed, seed, ref, 1, 0.02, seed, {"state": "float32"})
        journal.accept(order)
        kept = Kept(state, journal)
        file = kept.put(order, perform(order, artifact, kept.of(order), desk).kept_state)
        result = Result("device-0", run, seed, seed, 8, "cd" * 32, {}, {}, "")
        journal.finish(order, result, file)
    journal.close()
    return tmp_path / "agent.toml", state / file


def test_a_device_asks_the_network_that_it_trained_last(device, photos, capsys):
    settings, weights = device
    for number in range(4):  # with the other three, more than one batch of 4
        Image.new("RGB", (40, 30), (60 * number, 90, 40)).save(photos / f"z{number}.png")
    assert main.main(["predict", "--config", str(settings), str(photos), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    files = list(predict.photos([photos]))
    x = np.empty((len(files), 3, 32, 32), np.float32)
    pixels = np.stack([picture.fit(picture.open_image(file, 64), (32, 32), 3) for file in files])
    Preprocess((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))(pixels, out=x)
    network = models.build("resnet8", classes=3)
    trained = {n: a for n, a in load_file(weights).items() if not n.startswith("optim.")}
    with torch.inference_mode():
        logits = distill.load(network, trained).eval()(torch.from_numpy(x))
    expected = torch.softmax(logits, 1).numpy()
    assert [one["photo"] for one in found] == [str(file) for file in files]
    for one, row in zip(found, expected, strict=True):
        assert one["classes"][0]["name"] == CARD.classes[row.argmax()]
        assert one["classes"][0]["probability"] == pytest.approx(row.max(), abs=1e-4)
    assert len({one["classes"][0]["probability"] for one in found}) == len(files)


def test_a_device_without_a_network_of_its_own_says_what_leaves_one(tmp_path, photos, capsys):
    (tmp_path / "agent.toml").write_text(SETTINGS)
    arguments = ["predict", "--config", str(tmp_path / "agent.toml"), str(photos)]
    assert main.main(arguments) == 2
    (tmp_path / "state").mkdir()
    Journal(tmp_path / "state" / "journal.db").close()
    assert main.main(arguments) == 2
    for line in capsys.readouterr().err.splitlines():
        assert "expected a network that this device trained, got none; its first round" in line


def test_damaged_files_of_a_device_are_named_and_left_as_they_are(device, tmp_path):
    _, weights = device
    weights.write_bytes(b"none")
    with pytest.raises(ArtifactError, match=f"{weights.name}: cannot be read"):
        OwnNetwork(tmp_path / "state", threads=1)
    journal = tmp_path / "state" / "journal.db"
    journal.write_bytes(b"none" * 1000)
    with pytest.raises(StillhouseError, match=r"journal\.db: the journal cannot be read"):
        OwnNetwork(tmp_path / "state", threads=1)
    assert journal.read_bytes() == b"none" * 1000
