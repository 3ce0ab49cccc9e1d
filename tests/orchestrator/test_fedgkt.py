"""FedGKT's rules: what its orders ask for, what it refuses, and which fleets may be mixed."""

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch

from ondevice.payloads import extract_record
from orchestrator.config import (
    CohortConfig,
    DeviceConfig,
    Other,
    RunConfig,
    ServerConfig,
    TransferConfig,
)
from orchestrator.deploy.export import export_run
from orchestrator.display.report import Report
from orchestrator.launch import networks, prepare
from orchestrator.loop.contributions import Contributions
from orchestrator.run_folder.store import Store, last_checkpoint
from orchestrator.simulation import devices, simulate
from orchestrator.strategies import create
from orchestrator.strategies.gkt import extractors
from orchestrator.training import distill
from wire import frames, tensors
from wire.errors import AdmissionError, RunError, StillhouseError
from wire.messages import Result

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (16, 32, 32)


@pytest.fixture
def config(tmp_path, digits):
    return RunConfig(
        name="run",
        heldout=digits / "heldout.npz",
        runs=tmp_path / "runs",
        rounds=9,
        cohort=CohortConfig(min_devices=3),
        device=DeviceConfig(mean=(0.3,) * 3, std=(0.37,) * 3, features="float32"),
        server=ServerConfig(model="resnet10", epochs=1, batch=32, torch_device="cpu"),
    )


@pytest.fixture
def made(config, digits, request):
    """(strategy, births, store) of a configuration."""

    def make(chosen=config):
        store = Store(chosen)
        request.addfinalizer(store.close)
        task = prepare.task(
            chosen, store, prepare.variants(chosen), prepare.read_heldout(chosen),
            Report(chosen, store),
        )  # fmt: skip
        images = devices.read_shards(chosen, digits)
        births = {name: devices.birth(name, held) for name, held in images.items()}
        return create("fedgkt", task), births, store

    return make


def result(strategy, order, birth, *, change=None, what="features", records=None):
    """A device's answer, by default a correct one."""
    n, blobs = birth.samples * len(order.views), {}
    state = dict(strategy.task.initial_of(birth.device))
    if change:
        change(state)
    packed = tensors.pack(tensors.weights(state, "float32"), seed=0)
    blobs["state"] = strategy.task.blobs.put(packed)
    rng = np.random.default_rng(0)
    if records is None:
        features = np.maximum(rng.standard_normal((n, *SHAPE)), 0).astype(np.float32)
        logits = rng.standard_normal((n, 10)).astype(np.float32)
        maps = features if what == "features" else None
        records = extract_record(order, maps, logits, np.arange(n) % 10, first=0)
    blobs[what] = strategy.task.blobs.put(records)
    return Result(birth.device, order.run, order.sequence, order.round, birth.samples,
                  birth.data_digest, blobs)  # fmt: skip


def test_a_model_that_changes_in_mid_run_is_refused_by_name(made):
    strategy, births, _ = made()
    state = strategy.begin()
    orders = strategy.orders(state, 1, 1, births)
    name = min(births)
    strategy.admit(state, orders[name], result(strategy, orders[name], births[name]))

    def other(weights):
        weights["fc.weight"] = np.zeros((10, 16), np.float32)

    with pytest.raises(AdmissionError, match=r"'fc.weight': expected float32 \[10, 64\]"):
        strategy.admit(
            state, orders[name], result(strategy, orders[name], births[name], change=other)
        )

    def negative(weights):
        weights["extractor.1.running_var"] = np.full(16, -1, np.float32)

    with pytest.raises(AdmissionError, match="running_var': expected variances, got -1"):
        strategy.admit(
            state, orders[name], result(strategy, orders[name], births[name], change=negative)
        )
    with pytest.raises(AdmissionError, match=r"missing or unknown: .*'extra'"):
        strategy.admit(
            state, orders[name],
            result(strategy, orders[name], births[name],
                   change=lambda w: w.update(extra=w.pop("fc.bias"))),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((63, 10), np.float32), "63 samples, 64 were announced"),
        (np.zeros((65, 10), np.float32), "650 values together, limit 640"),
        (np.zeros((64, 9), np.float32), r"expected float32 \[n, 10\], got float32 \[64, 9\]"),
        (np.full((64, 10), 6e4, np.float32) * 1e6, "not finite or above"),
        (np.zeros((64, 2, 5), np.float32), r"expected float32 \[n, 10\]"),
    ],
)
def test_logits_that_do_not_fit_are_refused(made, config, array, text):
    config = replace(config, transfer=TransferConfig(freeze_after=0, logits="float32"))
    strategy, births, _ = made(config)
    state = strategy.begin()
    orders = strategy.orders(state, 1, 1, births)
    answers = [result(strategy, orders[n], births[n]) for n in births]
    for answer in answers:
        strategy.admit(state, orders[answer.device], answer)
    state, _ = Contributions(strategy).aggregate(state, 1, orders, answers)
    orders = strategy.orders(state, 2, 2, births)
    name = min(births)
    assert set(orders[name].returns) == {"state", "logits"}
    strategy.admit(state, orders[name], result(strategy, orders[name], births[name], what="logits"))
    packed = tensors.pack([("logits", array, "float32")], seed=0)
    with pytest.raises(StillhouseError, match=text):
        strategy.admit(
            state, orders[name],
            result(strategy, orders[name], births[name], what="logits", records=packed),
        )  # fmt: skip


def test_feature_maps_are_asked_for_again_where_the_samples_are_others(made, config):
    config = replace(config, transfer=TransferConfig(freeze_after=0, views=True))
    strategy, births, _ = made(config)
    state = strategy.begin()
    orders = strategy.orders(state, 1, 1, births)
    assert all(order.views == (0, 1) for order in orders.values())
    state, _ = Contributions(strategy).aggregate(
        state, 1, orders, [result(strategy, orders[n], births[n]) for n in births]
    )
    name = min(births)
    births[name] = replace(births[name], data_digest="ef" * 32)
    orders = strategy.orders(state, 2, 2, births)
    for device, order in orders.items():
        assert ("features" in order.returns) == (device == name)
        assert (order.teacher is None) == (device == name)
        assert order.augment is False
    # Each round has another view, and training uses the view of the teacher's logits.
    views = [strategy.orders(state, n, n, births)[name].view for n in (2, 3, 4)]
    assert len(set(views)) == 3
    assert min(views) > 1


def test_maps_of_a_frozen_stem_of_mirror_images_travel_once_and_plain(made, config):
    config = replace(
        config,
        device=replace(config.device, model="resnet8-opponent"),
        server=replace(config.server, model="fastcnn6-32", epochs=(0, 1, 0), optimizer="muon",
                       averaging=True, eval_views=True, lr=0.1, schedule="linear"),
        transfer=TransferConfig(freeze_after=0, extractor="shared", views=True),
    )  # fmt: skip
    strategy, births, _ = made(config)
    state = strategy.begin()
    entries = []
    for round_ in (1, 2, 3):
        orders = strategy.orders(state, round_, round_, births)
        assert all(order.views == (0,) for order in orders.values())
        what = "features" if round_ == 1 else "logits"
        assert all(what in order.returns for order in orders.values())
        answers = [result(strategy, orders[n], births[n], what=what) for n in births]
        state, entry = Contributions(strategy).aggregate(state, round_, orders, answers)
        entries.append(entry)
    assert ["server_loss" in entry for entry in entries] == [False, True, False]
    assert entries[1]["server_accuracy"] == entries[2]["server_accuracy"]
    assert 0 <= entries[2]["server_accuracy_averaged"] <= 1
    again = strategy.restore(state.pack())
    mirror = strategy.mirrors["resnet8-opponent"]
    assert [held.mirror for held in again.held.values()] == [mirror] * len(births)


def test_neither_logits_nor_teacher_travel_where_nobody_learns_from_them(made, config):
    config = replace(
        config,
        device=replace(config.device, alpha=0.0),
        server=replace(config.server, alpha=0.0),
        transfer=TransferConfig(freeze_after=0),
    )
    strategy, births, _ = made(config)
    state = strategy.begin()
    orders = strategy.orders(state, 1, 1, births)
    state, _ = Contributions(strategy).aggregate(
        state, 1, orders, [result(strategy, orders[n], births[n]) for n in births]
    )
    for order in strategy.orders(state, 2, 2, births).values():
        assert order.teacher is None
        assert set(order.returns) == {"state"}


def test_another_count_of_a_payload_that_is_here_is_refused(made):
    strategy, births, _ = made()
    orders = strategy.orders(strategy.begin(), 1, 1, births)
    name = min(births)
    proper = result(strategy, orders[name], births[name])
    strategy.admit(strategy.begin(), orders[name], proper)
    with pytest.raises(AdmissionError, match="features of 64 samples, 8 were announced"):
        strategy.admit(strategy.begin(), orders[name], replace(proper, samples=8))


def test_nobody_moves_a_shared_extractor_by_claiming_many_samples(made, config):
    config = replace(config, transfer=TransferConfig(extractor="shared"),
                     cohort=CohortConfig(min_devices=3, max_weight=1.0))  # fmt: skip
    strategy, births, _ = made(config)
    state = strategy.begin()
    orders = strategy.orders(state, 1, 1, births)
    answers = [result(strategy, orders[n], births[n]) for n in sorted(births)]

    def far(weights):
        weights["extractor.0.weight"] = weights["extractor.0.weight"] + 8

    liar = min(births)
    many = replace(births[liar], samples=640)
    answers[0] = result(strategy, orders[liar], many, change=far)
    after, _ = Contributions(strategy).aggregate(state, 1, orders, answers)
    moved = after.shared_extractor["0.weight"] - state.shared_extractor["0.weight"]
    assert np.allclose(moved, 8 / 3, atol=1e-5)  # it counts as one of three, not as ten of twelve


def test_teacher_logits_that_the_codec_cannot_hold_are_cut(made, caplog):
    strategy, _, _ = made()
    logits = np.array([[1e6, -1e6, 3.0]], np.float32)
    read = tensors.unpack(frames.decode(strategy._packed(logits)), where="t")["logits"]
    assert read.tolist() == [[65504.0, -65504.0, 3.0]]
    assert "they are cut" in caplog.text


def test_clipped_feature_maps_are_evaluated_and_exported_clipped(made, config, digits, tmp_path):
    config = replace(config, rounds=1, device=replace(config.device, clip=2.0))
    simulate.run(config, digits)
    _, state = last_checkpoint(config.folder)
    strategy, births, _ = made(replace(config, name="other"))
    name = min(births)
    made = extractors.build(strategy.task, name, state.under(f"extractor/{name}"))
    maps = made(strategy.task.heldout.x[:9])
    assert torch.allclose(maps.flatten(1).norm(dim=1), torch.tensor(2.0), rtol=1e-4)
    done = export_run(config.folder, tmp_path / "model.onnx", name)
    session = onnxruntime.InferenceSession(done.path)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (config.device.mean, config.device.std))
    pixels = strategy.task.heldout.x[:9] * std + mean
    (logits,) = session.run(None, {"image": pixels.numpy()})
    large = distill.load(strategy._large_model(), state.under("server")).eval()
    with torch.no_grad():
        np.testing.assert_allclose(logits, large(maps).numpy(), atol=1e-3)


def test_what_a_fleet_cannot_be_is_refused(made, config):
    others = (Other("resnet8-block2", "device-1"),)
    deep = replace(config.device, model="resnet8-block1", others=others)
    shared = replace(config, name="a", device=deep, transfer=TransferConfig(extractor="shared"))
    with pytest.raises(RunError, match="have different extractors, of which there is no mean"):
        made(shared)
    mixed = replace(
        config, device=replace(config.device, others=(Other("resnet8-block1", "device-1"),))
    )
    with pytest.raises(RunError, match="feature maps of the device models differ"):
        made(mixed)
    mixed = replace(
        config, name="b", device=replace(config.device, others=(Other("allconv", "x"),))
    )
    with pytest.raises(RunError, match="allconv has no feature extractor"):
        networks.check(mixed)
