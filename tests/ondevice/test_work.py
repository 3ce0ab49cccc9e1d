"""Work on the device gives the same as in PyTorch: order by order, sample by sample."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch.nn import functional as F

import models
from ondevice import views
from ondevice.images import ImageSet, Preprocess
from ondevice.kept import KeptFile
from ondevice.payloads import cover
from ondevice.work import CancelledError, Desk, perform
from orchestrator.training import distill
from tools.export import Sgd, export
from wire import frames, tensors
from wire.blobs import BlobStore
from wire.errors import ArtifactError, DataError
from wire.messages import BlobRef, Order

BATCH, SAMPLES = 8, 20
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def compiled(out, micro_batches=1, class_names=()):
    torch.manual_seed(1)
    return export(
        models.build("resnet8", classes=5),
        name="resnet8",
        classes=5,
        input_shape=(3, 32, 32),
        batch=BATCH,
        optimizer=Sgd(0.9, nesterov=True, weight_decay=5e-4),
        mean=MEAN,
        std=STD,
        out=out,
        micro_batches=micro_batches,
        class_names=class_names,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("artifact") / "a")


@pytest.fixture
def desk(tmp_path):
    rng = np.random.default_rng(0)
    images = ImageSet(
        rng.integers(0, 256, (SAMPLES, 32, 32, 3)).astype(np.uint8),
        rng.integers(0, 5, SAMPLES),
        "cd" * 32,
    )
    return Desk(images, BlobStore(tmp_path / "b"), 1, lambda *_: None, threading.Event())


def order(artifact, **changes) -> Order:
    plain = Order("run", 1, 1, BlobRef(artifact.digest, 1, 1024), 1, 0.02, 77, {"state": "float32"})
    return replace(plain, **changes)


def read(desk, ref):
    with desk.blobs.path(ref.digest).open("rb") as file:
        return [tensors.unpack(f, where="t") for f in frames.read(file, max_bytes=1 << 30)]


def in_pytorch(artifact, images, teacher, alpha, *, augment, parts=1):
    """The state dict after the same epochs with torch.optim."""
    weights = {n: a for n, a in load_file(artifact.weights).items() if not n.startswith("optim.")}
    model = distill.load(models.build("resnet8", classes=5), weights).train()
    step = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    x = np.empty((BATCH, 3, 32, 32), np.float32)
    for indices, pixels in views.epoch(images, batch=BATCH, seed=77, augment=augment):
        Preprocess(MEAN, STD)(pixels, out=x)
        logits = torch.cat([model(part) for part in torch.from_numpy(x).chunk(parts)])
        loss = F.cross_entropy(logits, torch.from_numpy(images.y[indices]))
        if teacher is not None:
            soft = F.kl_div(
                F.log_softmax(logits / 2, 1),
                F.log_softmax(torch.from_numpy(teacher[indices]) / 2, 1),
                reduction="batchmean",
                log_target=True,
            )
            loss = loss + alpha * 4 * soft
        step.zero_grad()
        loss.backward()
        step.step()
    return model


def assert_same(artifact, state, model):
    """Each tensor moved as in PyTorch, within 5 % (a single ReLU that flips makes 1 %)."""
    start = load_file(artifact.weights)
    for name, array in state.items():
        wanted = model.state_dict()[name].numpy()
        moved = float(np.abs(wanted - start[name]).max())
        assert np.abs(array - wanted).max() < 0.05 * moved + 1e-6, name


@pytest.mark.parametrize("augment", [False, True])
def test_an_order_with_a_teacher_trains_as_pytorch_does_with_logits_matched_by_sample(
    artifact, desk, augment
):
    teacher = np.random.default_rng(3).standard_normal((SAMPLES, 5)).astype(np.float32) * 4
    ref = desk.blobs.put(tensors.pack([("logits", teacher, "float32")], seed=0))
    work = order(
        artifact, teacher=ref, data_digest="cd" * 32, alpha=1.5, temperature=2.0, epochs=1,
        augment=augment,
    )  # fmt: skip
    outcome = perform(work, artifact, KeptFile(), desk)
    (state,) = read(desk, outcome.blobs["state"])
    right = in_pytorch(artifact, desk.images, teacher, 1.5, augment=augment)
    assert_same(artifact, state, right)
    # The teacher matters: logits of other samples give another result.
    wrong = in_pytorch(artifact, desk.images, np.roll(teacher, 1, axis=0), 1.5, augment=augment)
    with pytest.raises(AssertionError):
        assert_same(artifact, state, wrong)


def test_without_a_teacher_distillation_is_off(artifact, desk):
    outcome = perform(order(artifact, alpha=3.0), artifact, KeptFile(), desk)
    (state,) = read(desk, outcome.blobs["state"])
    assert_same(artifact, state, in_pytorch(artifact, desk.images, None, 0, augment=False))
    assert outcome.metrics["steps"] == 3
    assert outcome.metrics["train_peak_bytes"] > 10e6


def test_features_come_in_sample_order_from_the_trained_extractor(artifact, desk):
    work = order(artifact, returns={"features": "float32", "state": "float32"})
    outcome = perform(work, artifact, KeptFile(), desk)
    records = read(desk, outcome.blobs["features"])
    assert [len(r["labels"]) for r in records] == [8, 8, 4]
    joined = {key: np.concatenate([r[key] for r in records]) for key in records[0]}
    np.testing.assert_array_equal(joined["labels"], desk.images.y)
    (state,) = read(desk, outcome.blobs["state"])
    model = distill.load(models.build("resnet8", classes=5), state).eval()
    x = np.empty((SAMPLES, 3, 32, 32), np.float32)
    Preprocess(MEAN, STD)(desk.images.x, out=x)
    with torch.inference_mode():
        features, logits = model.extract(torch.from_numpy(x))
    np.testing.assert_allclose(joined["features"], features.numpy(), atol=1e-4)
    np.testing.assert_allclose(joined["logits"], logits.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def halved(tmp_path_factory):
    """The artifact, but with two micro-batches."""
    return compiled(tmp_path_factory.mktemp("halved") / "a", micro_batches=2)


def test_an_order_in_micro_batches_trains_as_pytorch_does_and_counts_every_run(
    artifact, halved, desk
):
    teacher = np.random.default_rng(3).standard_normal((SAMPLES, 5)).astype(np.float32) * 4
    ref = desk.blobs.put(tensors.pack([("logits", teacher, "float32")], seed=0))
    changes = {"teacher": ref, "data_digest": "cd" * 32, "alpha": 1.5, "temperature": 2.0}
    outcome = perform(order(halved, **changes, augment=True), halved, KeptFile(), desk)
    (state,) = read(desk, outcome.blobs["state"])
    right = in_pytorch(halved, desk.images, teacher, 1.5, augment=True, parts=2)
    assert_same(halved, state, right)
    whole = in_pytorch(halved, desk.images, teacher, 1.5, augment=True)
    with pytest.raises(AssertionError):  # batch norm sees different batches
        assert_same(halved, state, whole)
    assert outcome.metrics["steps"] == 3
    runs = outcome.metrics["train_flops"] / halved.manifest.graphs["train"].flops
    assert runs == 6
    unsplit = perform(order(artifact, **changes, augment=True), artifact, KeptFile(), desk).metrics
    # Twice the same products on half the samples; only the smallest do not depend on samples.
    assert outcome.metrics["train_flops"] == pytest.approx(unsplit["train_flops"], rel=0.01)
    assert 0 <= outcome.metrics["train_accuracy"] <= 1


def test_features_come_in_sample_order_from_an_extractor_of_micro_batches(halved, desk):
    work = order(halved, returns={"features": "float32", "state": "float32"})
    outcome = perform(work, halved, KeptFile(), desk)
    records = read(desk, outcome.blobs["features"])
    assert [len(r["labels"]) for r in records] == [4] * 5
    np.testing.assert_array_equal(np.concatenate([r["labels"] for r in records]), desk.images.y)
    (state,) = read(desk, outcome.blobs["state"])
    model = distill.load(models.build("resnet8", classes=5), state).eval()
    x = np.empty((SAMPLES, 3, 32, 32), np.float32)
    Preprocess(MEAN, STD)(desk.images.x, out=x)
    with torch.inference_mode():
        features, _ = model.extract(torch.from_numpy(x))
    joined = np.concatenate([r["features"] for r in records])
    np.testing.assert_allclose(joined, features.numpy(), atol=1e-4)


def test_own_weights_and_optimizer_go_on_from_order_to_order(artifact, desk, tmp_path):
    first = perform(order(artifact), artifact, KeptFile(), desk)
    own = tmp_path / "own.safetensors"
    save_file({name: np.asarray(array) for name, array in first.kept_state.items()}, own)
    second = perform(order(artifact, sequence=2, seed=78), artifact, KeptFile(own), desk)
    (state,) = read(desk, second.blobs["state"])
    once = perform(order(artifact, epochs=2), artifact, KeptFile(), desk)  # seeds 77 and 78
    (whole,) = read(desk, once.blobs["state"])
    for name, array in state.items():
        np.testing.assert_array_equal(array, whole[name])


def test_an_update_is_the_difference_to_the_given_state(artifact, desk):
    start = {n: a for n, a in load_file(artifact.weights).items() if not n.startswith("optim.")}
    given = {name: array * np.float32(0.9) for name, array in start.items()}
    ref = desk.blobs.put(tensors.pack(tensors.weights(given, "float32"), seed=0))
    work = order(artifact, state=ref, returns={"update": "float32", "state": "float32"})
    outcome = perform(work, artifact, KeptFile(), desk)
    (update,) = read(desk, outcome.blobs["update"])
    (state,) = read(desk, outcome.blobs["state"])
    for name, array in update.items():
        np.testing.assert_allclose(given[name] + array, state[name], atol=1e-6)
    assert outcome.kept_state is None


def test_what_is_owed_by_another_sub_model_is_left_alone(artifact, desk, tmp_path, caplog):
    """If its memory puts a device into another tier, what it owes has other shapes."""
    start = {n: a for n, a in load_file(artifact.weights).items() if not n.startswith("optim.")}
    given = desk.blobs.put(tensors.pack([(n, a, "float32") for n, a in start.items()], seed=0))
    spec = "eden|b=1|mse/float16"
    asked = order(artifact, state=given, returns={"update": spec}, feedback=True, owed=1)
    save_file({n: np.ones((2, *a.shape), np.float32) for n, a in start.items()}, tmp_path / "owed")
    plain = perform(asked, artifact, KeptFile(), desk)
    assert perform(asked, artifact, KeptFile(tmp_path / "owed"), desk).blobs == plain.blobs
    assert "owed is of another sub-model" in caplog.text


def test_logits_for_other_samples_are_refused(artifact, desk):
    teacher = np.zeros((SAMPLES, 5), np.float32)
    ref = desk.blobs.put(tensors.pack([("logits", teacher, "float32")], seed=0))
    with pytest.raises(DataError, match="data changed since the last round"):
        perform(order(artifact, teacher=ref, data_digest="ef" * 32), artifact, KeptFile(), desk)
    short = desk.blobs.put(tensors.pack([("logits", teacher[:7], "float32")], seed=0))
    with pytest.raises(DataError, match=r"expected float32 \(20, 5\), got \('float32', \(7, 5\)\)"):
        perform(order(artifact, teacher=short, data_digest="cd" * 32), artifact, KeptFile(), desk)


def test_a_proximal_weight_is_refused_where_the_artifact_has_no_such_term(artifact, desk):
    with pytest.raises(ArtifactError, match=r"no proximal term for mu = 0\.1; export it"):
        perform(order(artifact, mu=0.1), artifact, KeptFile(), desk)


def test_foreign_weights_and_a_foreign_data_set_are_refused(artifact, desk):
    ref = desk.blobs.put(tensors.pack([("w", np.ones((2, 2), np.float32), "float32")], seed=0))
    with pytest.raises(ArtifactError, match="'w' is"):
        perform(order(artifact, state=ref), artifact, KeptFile(), desk)
    odd = replace(desk, images=replace(desk.images, y=desk.images.y + 1))
    with pytest.raises(DataError, match="expected labels from 0 to 4"):
        perform(order(artifact), artifact, KeptFile(), odd)


def test_a_cancelled_order_stops_within_a_step(artifact, desk):
    desk.cancel.set()
    with pytest.raises(CancelledError):
        perform(order(artifact), artifact, KeptFile(), desk)


def test_the_same_order_gives_the_same_bytes(artifact, desk):
    work = order(artifact, returns={"features": "hadamard|q=4", "state": "identity|q=8"})
    first = perform(work, artifact, KeptFile(), desk).blobs
    assert perform(work, artifact, KeptFile(), desk).blobs == first


def test_feature_maps_are_clipped_and_covered_by_noise_that_nobody_can_draw_again():
    rng = np.random.default_rng(0)
    maps = np.maximum(rng.standard_normal((4, 16, 32, 32)), 0).astype(np.float32)
    maps[0] /= 1e3
    work = Order("run", 1, 1, BlobRef("ab" * 32, 1, 1024), 1, 0.1, 7, {"features": "float32"})
    assert cover(maps, work) is maps
    clipped = cover(maps, replace(work, clip=5.0))
    norms = np.linalg.norm(clipped.reshape(4, -1), axis=1)
    np.testing.assert_allclose(norms[1:], 5.0, rtol=1e-5)
    np.testing.assert_array_equal(clipped[0], maps[0])
    noisy = [cover(maps, replace(work, clip=5.0, noise=2.0)) for _ in range(2)]
    assert not np.array_equal(*noisy)
    assert noisy[0].min() == 0
    # Half of a normal distribution with deviation 2 * 5; the maps themselves are almost zero.
    assert np.sqrt(np.square(noisy[0][0]).mean() * 2) == pytest.approx(10.0, rel=0.05)
    with pytest.raises(ValueError, match="a clip over 0 where there is noise"):
        replace(work, noise=1.0)


# Names of classes


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("named") / "a", class_names=tuple("abcde"))


def test_labels_go_by_the_names_in_the_artifact(named, desk):
    """Two devices have the same images, but one numbers its classes in another order."""
    y = np.array([1, 4, 0])[np.arange(SAMPLES) % 3]
    here = ImageSet(desk.images.x, y, desk.images.digest, tuple("abcde"))
    there = replace(here, y=np.arange(SAMPLES) % 3, names=("b", "e", "a"))
    asked = order(named, returns={"features": "float32", "state": "float32"})
    one, other = (perform(asked, named, KeptFile(), replace(desk, images=i)) for i in (here, there))
    assert one.blobs == other.blobs
    labels = np.concatenate([record["labels"] for record in read(desk, other.blobs["features"])])
    assert labels.tolist() == y.tolist()


def test_a_class_that_the_artifact_does_not_have_is_refused_before_anything_is_done(named, desk):
    images = replace(desk.images, names=("a", "B", "c", "d", "e"), source="images")
    with pytest.raises(DataError, match=r"images: a class is not known: 'B' \('b' differs in cap"):
        perform(order(named), named, KeptFile(), replace(desk, images=images))
    assert not list(desk.blobs.folder.iterdir())


def test_numbers_where_the_artifact_has_names_are_warned_of_once(named, desk, caplog):
    asked = order(named, epochs=0)
    for _ in range(2):
        perform(
            asked, named, KeptFile(), replace(desk, images=replace(desk.images, source="plain.npz"))
        )
    (said,) = [text for text in caplog.messages if "names no classes" in text]
    assert said.startswith("plain.npz names no classes: its label 0 is taken for the first of 'a'")
