"""One order, two engines: an agent's ONNX Runtime and a simulation's PyTorch do the same."""

import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import models
from ondevice import kept
from ondevice.images import ImageSet
from ondevice.kept import KeptFile
from ondevice.meter import Meter
from ondevice.order import begin
from ondevice.outcome import finish
from ondevice.views import MIRRORED, PLAIN
from ondevice.work import Desk, OnnxEngine
from orchestrator.config import DeviceConfig
from orchestrator.simulation.stack import TorchEngine
from orchestrator.training import distill
from tools.export import Adam, Sgd, export
from wire import frames, tensors
from wire.blobs import BlobStore
from wire.messages import BlobRef, Order

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES, SAMPLES, DIGEST = 5, 28, "cd" * 32
PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
CPU = torch.device("cpu")
SETTINGS = {
    "sgd": (
        DeviceConfig("resnet8", classes=CLASSES, batch=8, **PIXELS),
        {"optimizer": Sgd(0.9, nesterov=True, weight_decay=5e-4)},
    ),
    "adam": (
        DeviceConfig("resnet8", classes=CLASSES, batch=8, optimizer="adam", **PIXELS),
        {"optimizer": Adam(weight_decay=5e-4)},
    ),
    "proximal": (
        DeviceConfig("resnet8", classes=CLASSES, batch=8, mu=0.5, momentum=0.0, **PIXELS),
        {"optimizer": Sgd(0.0, nesterov=False), "proximal": True, "task": "classify"},
    ),
}
# Tolerance between the two: a ReLU that flips by rounding changes a gradient by a percent.
LOOSE = {"rel": 0.03, "abs": 1e-6}


def network(seed=1):
    torch.manual_seed(seed)
    return models.build("resnet8", classes=CLASSES)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("artifacts"), {}
    for name, (_, settings) in SETTINGS.items():
        made[name] = export(
            network(), name="resnet8", classes=CLASSES, input_shape=(3, 32, 32), batch=8,
            out=folder / name, **PIXELS, **settings,
        )  # fmt: skip
    return made


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (SAMPLES, 32, 32, 3)).astype(np.uint8)
    return ImageSet(x, rng.integers(0, CLASSES, SAMPLES), DIGEST)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


def order(**changes):
    returns = {"state": "float32"}
    return replace(Order("run", 1, 1, BlobRef("ab" * 32, 1, 1024), 1, 0.02, 77, returns), **changes)


@pytest.fixture
def engines(artifacts, images, blobs):
    """Both engines, for one of the settings."""

    def made(name):
        config, _ = SETTINGS[name]
        desk = Desk(images, blobs, 1, lambda *_: None, threading.Event())
        return {
            "onnx": OnnxEngine(artifacts[name], desk, Meter()),
            "torch": TorchEngine(network(), config, CPU),
        }

    return made


def do(engine, chosen, images, blobs, kept_file=None):
    start = begin(chosen, engine.model, images, blobs, KeptFile(kept_file))
    trained = engine.train([start])[0] if chosen.epochs else None
    return finish(start, trained, engine, blobs)


def test_a_simulations_network_is_forgotten_with_its_engine(images, blobs):
    engine = TorchEngine(network(), SETTINGS["sgd"][0], CPU)
    whose = weakref.ref(engine._network)
    assert do(engine, order(), images, blobs).metrics["train_flops"]
    del engine
    gc.collect()
    assert whose() is None


def read(blobs, ref):
    """The tensors of a payload, with all its records joined."""
    with blobs.path(ref.digest).open("rb") as file:
        records = [tensors.unpack(f, where="t") for f in frames.read(file, max_bytes=1 << 30)]
    if len(records) == 1:
        return records[0]
    return {key: np.concatenate([record[key] for record in records]) for key in records[0]}


def assert_close(these, those, start=None, share=0.05):
    """All tensors together moved from `start` like the others, within a share of the distance."""
    assert these.keys() == those.keys()
    begun = start or {}
    apart = [np.linalg.norm(array - those[name]) for name, array in these.items()]
    moved = [np.linalg.norm(those[name] - begun.get(name, 0)) for name in these]
    assert np.linalg.norm(apart) <= share * np.linalg.norm(moved)


def assert_same(done, blobs, start, share=0.05):
    """Payloads, metrics and kept states have the same names, and nearly the same values."""
    onnx, other = done["onnx"], done["torch"]
    assert [*onnx.blobs] == [*other.blobs]
    for what, ref in onnx.blobs.items():
        begun = start if what == "state" else None
        assert_close(read(blobs, ref), read(blobs, other.blobs[what]), begun, share)
    expected = {n: v for n, v in other.metrics.items() if n != "train_flops"}
    measured = {n: v for n, v in onnx.metrics.items() if n != "train_flops"}
    assert measured == pytest.approx(expected, **LOOSE)
    assert ("train_flops" in onnx.metrics) == ("train_flops" in other.metrics)
    if "train_flops" in onnx.metrics:
        assert 1 <= onnx.metrics["train_flops"] / other.metrics["train_flops"] < 1.1
    assert (onnx.kept_state is None) == (other.kept_state is None)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_order_with_weights_trains_the_same(engines, images, blobs, name):
    begun = distill.weights(network(seed=2))
    ref = blobs.put(tensors.pack(tensors.weights(begun, "float32"), seed=0))
    config, _ = SETTINGS[name]
    chosen = order(state=ref, returns={"update": "float32"}, epochs=2, augment=True, mu=config.mu,
                   lr=0.001 if name == "adam" else 0.02)  # fmt: skip
    done = {key: do(each, chosen, images, blobs) for key, each in engines(name).items()}
    assert_same(done, blobs, begun)
    assert done["onnx"].kept_state is None


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_own_weights_and_optimizer_go_on_under_a_teacher_the_same(
    engines, images, blobs, tmp_path, name
):
    """The second order brings some of the weights, which replace those that the first left."""
    part = {n: a for n, a in distill.weights(network(seed=2)).items() if n.startswith("extractor")}
    ref = blobs.put(tensors.pack(tensors.weights(part, "float32"), seed=0))
    logits = np.random.default_rng(3).standard_normal((SAMPLES, CLASSES)).astype(np.float32) * 4
    teacher = blobs.put(tensors.pack([("logits", logits, "float32")], seed=0))
    rate = 0.001 if name == "adam" else 0.02
    second = order(
        sequence=2, round=2, state=ref, own=True, teacher=teacher, data_digest=DIGEST, alpha=1.5,
        temperature=2.0, holdout=0.25, view=77, lr=rate,
        returns={"features": "float32", "state": "float32"},
    )  # fmt: skip
    done = {}
    for key, engine in engines(name).items():
        first = do(engine, order(lr=rate), images, blobs)
        kept.write(tmp_path / key, first.kept_state)
        done[key] = do(engine, second, images, blobs, tmp_path / key)
    start = distill.weights(network()) | part
    assert_same(done, blobs, start)
    assert {"teacher_heldout_accuracy", "heldout_accuracy"} <= done["onnx"].metrics.keys()
    optimizers = [
        {n: a for n, a in outcome.kept_state.items() if n.startswith("optim.")}
        for outcome in done.values()
    ]
    assert_close(*optimizers)
    weights = [
        {n: a for n, a in outcome.kept_state.items() if n not in optimizers[0]}
        for outcome in done.values()
    ]
    assert_close(*weights, start)


def test_error_feedback_sends_later_what_was_left_out_the_same(engines, images, blobs, tmp_path):
    begun = distill.weights(network(seed=2))
    ref = blobs.put(tensors.pack(tensors.weights(begun, "float32"), seed=0))
    first = order(state=ref, returns={"update": "eden|b=1|mse"}, feedback=True)
    second = replace(first, sequence=2, round=2, owed=1)
    sums = {}
    for key, engine in engines("sgd").items():
        owed = do(engine, first, images, blobs)
        kept.write(tmp_path / key, owed.kept_state)
        done = do(engine, second, images, blobs, tmp_path / key)
        # Rounding may differ, but what was sent plus what is owed is the sum of both updates.
        sent = [read(blobs, outcome.blobs["update"]) for outcome in (owed, done)]
        sums[key] = {n: sent[0][n] + sent[1][n] + a for n, a in done.kept_state.items()}
        plain = do(engine, second, images, blobs)
        assert plain.blobs != done.blobs
    assert_close(sums["onnx"], sums["torch"])


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_feature_maps_of_several_views_are_extracted_the_same(engines, images, blobs, clip):
    chosen = order(
        epochs=0, holdout=0.25, clip=clip, views=(PLAIN, MIRRORED, 77),
        returns={"features": "float32", "state": "float32"},
    )  # fmt: skip
    done = {key: do(each, chosen, images, blobs) for key, each in engines("sgd").items()}
    assert_same(done, blobs, None, share=1e-4)
    onnx = done["onnx"]
    features = read(blobs, onnx.blobs["features"])
    assert features["labels"].tolist() == images.y.tolist() * 3
    assert onnx.metrics.keys() == {"extract_accuracy", "heldout_accuracy", "extract_flops"}
    assert onnx.kept_state is None


@pytest.mark.parametrize("name", ["sgd", "proximal"])
def test_logits_alone_are_the_same(engines, images, blobs, name):
    chosen = order(epochs=0, returns={"logits": "float32"})
    done = {key: do(each, chosen, images, blobs) for key, each in engines(name).items()}
    assert_same(done, blobs, None, share=1e-4)


# A stack of devices


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stack_of_devices_trains_as_each_does_alone(images, blobs, name):
    """Devices differ in their number of samples, and only some have a teacher or kept state."""
    config, _ = SETTINGS[name]
    engine = TorchEngine(network(), config, CPU)
    logits = np.random.default_rng(3).standard_normal((SAMPLES, CLASSES)).astype(np.float32)
    teacher = blobs.put(tensors.pack([("logits", logits, "float32")], seed=0))
    rate = 0.001 if name == "adam" else 0.02
    few = ImageSet(images.x[:10], images.y[:10], "ef" * 32)
    common = order(epochs=2, mu=config.mu, lr=rate, temperature=3.0)
    before = [begin(common, engine.model, held, blobs, KeptFile()) for held in (few, images)]
    pasts = [trained.state for trained in engine.train(before)]
    orders = [
        replace(common, seed=1),
        replace(common, seed=2, teacher=teacher, data_digest=DIGEST, alpha=1.0),
    ]
    starts = [
        replace(begin(chosen, engine.model, held, blobs, KeptFile()), state=past)
        for chosen, held, past in zip(orders, (few, images), pasts, strict=True)
    ]
    together = engine.train(starts)
    for start, trained in zip(starts, together, strict=True):
        (alone,) = engine.train([start])
        weights = [{n: each.state[n] for n in engine.model.sent} for each in (trained, alone)]
        assert_close(*weights, start.state, 0.01)
        assert trained.state.keys() == alone.state.keys() == start.state.keys()
        assert trained.loss == pytest.approx(alone.loss, rel=1e-3)
        assert (trained.correct, trained.flops) == (alone.correct, alone.flops)
