"""Simulated runs do what agents would do, from the same seeds, with the same bytes."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file
from threadpoolctl import threadpool_info

import models
from ondevice import views
from ondevice.images import Preprocess
from ondevice.kept import KeptFile
from ondevice.payloads import encode_update
from ondevice.work import Desk, perform
from orchestrator import datasets
from orchestrator.config import (
    AverageConfig,
    CohortConfig,
    DeviceConfig,
    Other,
    RunConfig,
    ServerConfig,
    SubmodelConfig,
    Tier,
    TransferConfig,
)
from orchestrator.deploy import export
from orchestrator.display.report import Report
from orchestrator.launch import artifacts, prepare
from orchestrator.loop.contributions import Contributions
from orchestrator.rules import rounds
from orchestrator.run_folder.store import Store, last_checkpoint, read_checkpoint, roll_back
from orchestrator.simulation import devices, simulate
from orchestrator.simulation.kept import Kept
from orchestrator.strategies import create
from orchestrator.strategies.fedavg import FedAvg
from orchestrator.strategies.feddropout import FedDropout
from orchestrator.strategies.fedgkt import FedGKT
from orchestrator.strategies.gkt.state import GktState
from orchestrator.strategies.local import Local
from orchestrator.training import distill
from tests.conftest import ROOT
from wire import frames, records, tensors
from wire.artifact import open_artifact
from wire.errors import DataError, RunError, StalledError, StorageError
from wire.messages import BlobRef, Order, Result

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = DeviceConfig(
    model="caldas_cnn", batch=16, lr=0.05, momentum=0.0, weight_decay=0.0, mean=(0.3,) * 3,
    std=(0.37,) * 3,
)  # fmt: skip


@pytest.fixture
def config(tmp_path, digits):
    return RunConfig(
        name="run",
        heldout=digits / "heldout.npz",
        strategy="feddropout",
        rounds=2,
        runs=tmp_path / "runs",
        cohort=CohortConfig(min_devices=2, max_devices=2),
        device=replace(DEVICE, state="hadamard|q=8", update="eden|b=4"),
        submodel=SubmodelConfig(keep_rate=0.5),
        server=ServerConfig(torch_device="cpu"),
    )


def weights_of(config):
    _, state = last_checkpoint(config.folder)
    return state.tensors


def assert_close(these, those, start, share):
    """All tensors moved like the others within a share of the distance, and each within 0.6 of its.

    A ReLU that flips by rounding changes a filter's gradient by a percent, with Adam by more. A
    filter before a batch norm moves little: it was off by 0.1 of its distance with PyTorch's
    AVX-512 and AVX2 kernels, and by 0.41 with kernels that need neither. If a tensor is not trained
    at all, it is off by 1.
    """
    apart = {name: np.linalg.norm(array - those[name]) for name, array in these.items()}
    moved = {name: np.linalg.norm(those[name] - start[name]) for name in these}
    assert np.linalg.norm([*apart.values()]) <= share * np.linalg.norm([*moved.values()])
    for name, distance in apart.items():
        assert distance <= 0.6 * moved[name] + 1e-6, name


def start_of(config):
    return {f"global/{n}": a for n, a in distill.weights(prepare.fresh(config)).items()}


def test_a_simulated_run_is_repeatable_and_goes_on_where_it_stopped(config, digits, tmp_path):
    whole = simulate.run(config, digits)
    assert [entry["round"] for entry in whole.entries] == [1, 2]
    halves = replace(config, runs=tmp_path / "halves")
    simulate.run(replace(halves, rounds=1), digits)
    report = simulate.run(halves, digits)
    assert [entry["cohort"] for entry in report.entries] == [e["cohort"] for e in whole.entries]
    for name, array in weights_of(config).items():
        assert np.array_equal(array, weights_of(halves)[name]), name


def test_what_is_counted_are_the_payloads_that_codecs_made(config, digits):
    report = simulate.run(replace(config, rounds=1), digits)
    values = sum(a.size for a in distill.weights(prepare.fresh(config)).values())
    for device in report.entries[0]["devices"].values():
        # Half the units on both sides of a layer leave a quarter of its weights, at 8 and 4 bits.
        assert 0.25 < device["bytes_down"] / values < 0.30
        assert 0.12 < device["bytes_up"] / values < 0.16
        assert device["train_flops"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mu": 0.5, "optimizer": "adam", "lr": 0.001},
        {"model": "resnet8", "momentum": 0.9, "weight_decay": 5e-4, "lr": 0.01},
    ],
    ids=["sgd", "proximal-adam", "batch-norm-momentum"],
)
def test_agents_with_onnx_runtime_arrive_where_the_simulation_does(
    config, digits, tmp_path, settings
):
    """The same strategy, with orders done by `ondevice.work` in place of PyTorch.

    Its codecs are lossless, because a stochastic rounding may fall the other way.
    """
    exact = replace(config.device, state="float32", update="float32", **settings)
    config = replace(config, device=exact)
    expected = simulate.run(config, digits).entries
    real = replace(config, runs=tmp_path / "real")
    images = devices.read_shards(config, digits)
    births = {name: devices.birth(name, held) for name, held in images.items()}
    store = Store(real)
    try:
        variants = artifacts.prepare_variants(real, store)
        task = prepare.task(real, store, variants, prepare.read_heldout(real), Report(real, store))
        strategy = create(real.strategy, task)
        state = strategy.begin()
        for number in (1, 2):
            names = rounds.choose(dict.fromkeys(births, 1), 2, real.seed, number)
            orders = strategy.orders(
                state, number, number, {name: births[name] for name in sorted(names)}
            )
            results = []
            for name, order in orders.items():
                desk = Desk(images[name], store.blobs, 1, lambda *_: None, threading.Event())
                artifact = open_artifact(store.folder / "artifact-0.5")
                outcome = perform(order, artifact, KeptFile(), desk)
                results.append(
                    Result(name, order.run, order.sequence, number, len(images[name].y),
                           blobs=outcome.blobs, submodel=order.submodel)
                )  # fmt: skip
                same = expected[number - 1]["devices"][name]
                assert outcome.metrics["train_loss"] == pytest.approx(same["train_loss"], rel=0.01)
                flops = outcome.metrics["train_flops"] / same["train_flops"]
                assert 0.9 < flops < 1.25, flops
                strategy.admit(state, order, results[-1])
            state, _ = Contributions(strategy).aggregate(state, number, orders, results)
    finally:
        store.close()
    assert_close(state.pack().tensors, weights_of(config), start_of(config), 0.05)
    simulated = replace(config, runs=tmp_path / "simulated")
    simulate.run(simulated, digits, engine="onnx")
    for name, array in weights_of(simulated).items():
        assert np.array_equal(array, state.pack().tensors[name]), name


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder of handwritten digits: 3 devices with 32 images each, 40 images held out."""
    folder = tmp_path_factory.mktemp("few")
    datasets.build("digits", folder, devices=3, per_device=32, heldout_samples=40)
    return folder


@pytest.fixture
def gkt(config, few):
    device = DeviceConfig(
        model="resnet8", batch=16, lr=0.02, mean=(0.3,) * 3, std=(0.37,) * 3, features="float32"
    )
    return replace(
        config,
        heldout=few / "heldout.npz",
        strategy="fedgkt",
        rounds=3,
        device=device,
        submodel=SubmodelConfig(),
        server=ServerConfig(model="resnet10", epochs=1, batch=32, torch_device="cpu"),
    )


@pytest.mark.parametrize(
    ("settings", "transfer"),
    [
        ({}, {}),
        ({"optimizer": "adam", "lr": 0.001, "augment": True}, {}),
        ({}, {"views": True, "extractor": "shared", "freeze_after": 1}),
        ({"others": (Other("resnet4", "device-1"),), "holdout": 0.2}, {"views": True}),
        ({}, {"extractor": "shared", "network": "shared", "freeze_after": 1}),
    ],
    ids=["sgd", "adam-augment", "shared-frozen-views", "two-models-views", "shared-network"],
)
def test_fedgkt_with_agents_arrives_where_its_simulation_does(
    gkt, few, tmp_path, settings, transfer
):
    """Devices keep their own weights and optimizer; from round 2 on they have a teacher."""
    gkt = replace(gkt, device=replace(gkt.device, **settings), transfer=TransferConfig(**transfer))
    expected = simulate.run(gkt, few).entries
    real = replace(gkt, runs=tmp_path / "real")
    images = devices.read_shards(gkt, few)
    births = {name: devices.birth(name, held) for name, held in images.items()}
    own = {}
    store = Store(real)
    try:
        variants = artifacts.prepare_variants(real, store)
        task = prepare.task(real, store, variants, prepare.read_heldout(real), Report(real, store))
        strategy = create(real.strategy, task)
        state = strategy.begin()
        for number, entry in enumerate(expected, 1):
            orders = strategy.orders(
                state, number, number, {name: births[name] for name in entry["cohort"]}
            )
            results = []
            for name, order in orders.items():
                desk = Desk(images[name], store.blobs, 1, lambda *_: None, threading.Event())
                artifact = next(
                    open_artifact(path) for path in store.folder.glob("artifact*")
                    if open_artifact(path).digest == order.artifact.digest
                )  # fmt: skip
                done = perform(order, artifact, KeptFile(own.get(name)), desk)
                own[name] = tmp_path / f"{name}.safetensors"
                save_file(done.kept_state, own[name])
                results.append(
                    Result(name, order.run, order.sequence, number, len(images[name].y),
                           images[name].digest, done.blobs, done.metrics)
                )  # fmt: skip
                strategy.admit(state, order, results[-1])
                same = entry["devices"][name]
                assert done.metrics["train_loss"] == pytest.approx(same["train_loss"], rel=0.03)
                assert sum(ref.size for ref in done.blobs.values()) == same["bytes_up"]
            state, metrics = Contributions(strategy).aggregate(state, number, orders, results)
            assert metrics["server_loss"] == pytest.approx(entry["server_loss"], rel=0.03)
    finally:
        store.close()
    assert len({name for entry in expected for name in entry["cohort"]}) == 3


def test_feature_maps_travel_only_when_they_are_others(gkt, few):
    """The payloads' bytes in each round, without weights; the server reuses the maps it has."""
    gkt = replace(gkt, cohort=CohortConfig(min_devices=3), rounds=4)
    gkt = replace(gkt, device=replace(gkt.device, features="relu|q=2|zstd"))

    def up(**transfer):
        chosen = replace(
            gkt, name="-".join(transfer) or "plain", transfer=TransferConfig(**transfer)
        )
        entries = simulate.run(chosen, few).entries
        assert entries[-1]["server_loss"] < entries[0]["server_loss"]
        return [sum(d["bytes_up"] - packed for d in e["devices"].values()) for e in entries]

    own = distill.weights(prepare.fresh(gkt))
    packed = len(tensors.pack(tensors.weights(own, "float32"), seed=0))
    every = up()
    assert max(every) < 1.2 * min(every)
    frozen = up(freeze_after=2)  # own extractors: maps sent again would be the same
    assert frozen[:2] == every[:2]
    assert max(frozen[2:]) < 0.1 * every[2]
    shared = up(extractor="shared", freeze_after=1, views=True)
    assert shared[1] > 1.5 * shared[0]  # plain and mirrored, once
    assert shared[3] == shared[2] < 0.1 * shared[0]
    lazy = up(resend=0.9)
    assert lazy[0] == every[0]
    assert max(lazy[1:]) < 0.1 * every[1]


@pytest.mark.parametrize("transfer", [{}, {"freeze_after": 1, "views": True}], ids=["", "cropped"])
def test_a_server_without_images_evaluates_on_what_devices_hold_out(gkt, few, transfer):
    device = replace(gkt.device, holdout=0.25)
    gkt = replace(gkt, heldout=None, device=device, cohort=CohortConfig(min_devices=3))
    gkt = replace(gkt, transfer=TransferConfig(**transfer))
    entry = simulate.run(gkt, few).entries[-1]
    _, state = last_checkpoint(gkt.folder)
    large = models.build("resnet10", classes=10, input_shape=(16, 32, 32))
    distill.load(large, state.under("server")).eval()
    right = []
    for name, held in devices.read_shards(gkt, few).items():
        mask = views.held_out(held.digest, len(held.y), 0.25)
        assert 0 < mask.sum() < len(mask)
        x = np.empty((mask.sum(), 3, 32, 32), np.float32)
        Preprocess(device.mean, device.std)(held.x[mask], out=x)
        small = models.build("resnet8", classes=10)
        distill.load(small, state.under(f"device/{name}")).eval()
        with torch.no_grad():
            features, logits = small.extract(torch.from_numpy(x))
            right.append(large(features).argmax(1).numpy() == held.y[mask])
        assert entry["devices"][name]["server_accuracy"] == pytest.approx(right[-1].mean())
        own = (logits.argmax(1).numpy() == held.y[mask]).mean()
        assert entry["devices"][name]["device_accuracy"] == pytest.approx(own)
        assert entry["devices"][name]["heldout_accuracy"] == pytest.approx(own)
        assert entry["devices"][name]["steps"] == views.steps(int((~mask).sum()), device.batch)
    assert entry["server_accuracy"] == pytest.approx(np.concatenate(right).mean())


def test_late_devices_count_in_the_round_after(gkt, few, tmp_path):
    cohort_ = CohortConfig(min_devices=3, carry_rounds=1)
    gkt = replace(gkt, cohort=cohort_, transfer=TransferConfig(age_decay=0.5))
    report = simulate.run(gkt, few, late=0.4)
    joined = [{n for n, d in e["devices"].items() if d.get("accepted")} for e in report.entries]
    assert [len(names) for names in joined] == [2, 3, 2]
    (first,) = set(report.entries[0]["cohort"]) - joined[0]
    assert first in joined[1]
    parts = replace(gkt, runs=tmp_path / "parts")
    for last in (1, 2, 3):
        simulate.run(replace(parts, rounds=last), few, late=0.4)
    for name, array in weights_of(gkt).items():
        assert np.array_equal(array, weights_of(parts)[name]), name
    gone = replace(gkt, runs=tmp_path / "gone", cohort=CohortConfig(min_devices=3))
    entries = simulate.run(gone, few, late=0.4).entries
    assert [sum("accepted" in d for d in e["devices"].values()) for e in entries] == [2, 2, 2]


def test_devices_go_on_with_the_mean_of_their_extractors(gkt, few):
    gkt = replace(gkt, cohort=CohortConfig(min_devices=3), rounds=2)
    gkt = replace(gkt, transfer=TransferConfig(extractor="shared", freeze_after=1))
    simulate.run(gkt, few)
    _, state = last_checkpoint(gkt.folder)
    shared = state.under("shared")
    images = devices.read_shards(gkt, few)
    before = read_checkpoint(gkt.folder, 1)
    for key, array in shared.items():
        own = [before.under(f"device/{name}")[f"extractor.{key}"] for name in images]
        sizes = [len(held.y) for held in images.values()]
        np.testing.assert_allclose(array, np.average(own, axis=0, weights=sizes), atol=1e-6)
        for name in images:  # frozen: devices still hold it
            assert np.array_equal(state.under(f"device/{name}")[f"extractor.{key}"], array)
            assert np.array_equal(state.under(f"extractor/{name}")[key], array)


@pytest.mark.parametrize("freeze_after", [None, 1])
def test_devices_with_one_model_go_on_with_the_mean_of_their_networks(gkt, few, freeze_after):
    transfer = TransferConfig(extractor="shared", network="shared", freeze_after=freeze_after)
    gkt = replace(gkt, cohort=CohortConfig(min_devices=3), rounds=2, transfer=transfer)
    gkt = replace(gkt, device=replace(gkt.device, others=(Other("resnet4", "device-1"),)))
    entries = simulate.run(gkt, few).entries
    _, state = last_checkpoint(gkt.folder)
    sizes = {name: len(held.y) for name, held in devices.read_shards(gkt, few).items()}
    alike = {"resnet8": ["device-0", "device-2"], "resnet4": ["device-1"]}
    for model, names in alike.items():
        together = GktState.unpack(state, alike).shared(model)
        assert together.keys() == state.under(f"device/{names[0]}").keys()
        for key, array in together.items():
            of = [*sizes] if key.startswith("extractor.") else names
            own = [state.under(f"device/{name}")[key] for name in of]
            mean = np.average(own, axis=0, weights=[sizes[name] for name in of])
            np.testing.assert_allclose(array, mean, atol=1e-6)
        small = models.build(model, classes=10, input_shape=(3, 32, 32))
        exported, expected = outputs(gkt, distill.load(small, together), names[-1], few)
        np.testing.assert_allclose(exported, expected, atol=1e-4)
        labels = np.load(few / "heldout.npz")["y"]
        right = (expected.argmax(axis=1) == labels).mean()
        for name in names:
            score = entries[-1]["devices"][name]["device_accuracy"]
            assert score == pytest.approx(right, abs=0.011)


@pytest.mark.parametrize("student_views", [True, False])
def test_students_see_the_images_that_their_teacher_saw(gkt, few, monkeypatch, student_views):
    """The server crops feature maps itself in both cases."""
    transfer = TransferConfig(
        extractor="shared", freeze_after=1, views=True, student_views=student_views
    )
    gkt = replace(gkt, cohort=CohortConfig(min_devices=3), rounds=3, transfer=transfer)
    simulate.run(gkt, few)
    monkeypatch.setattr(Store, "_claim_devices", lambda *_: None)  # the run is a simulation's
    with contextlib.closing(Store(gkt)) as store:
        orders = store.last_attempt(closed=True).orders
    taught = read_checkpoint(gkt.folder, 2).notes["teachers"]
    assert orders.keys() == taught.keys()
    for name, order in orders.items():
        assert order.view == taught[name]["view"]
        assert (order.view > views.MIRRORED) == student_views
        assert order.views == (views.PLAIN, views.MIRRORED)
    shards = last_checkpoint(gkt.folder)[1].notes["shards"]
    assert all(shard["cropped"] for shard in shards.values())


def test_a_late_extractor_does_not_move_what_is_frozen(gkt, few):
    """It was trained before the other devices' extractor was frozen, and comes a round later."""
    transfer = TransferConfig(extractor="shared", network="shared", freeze_after=1)
    gkt = replace(gkt, cohort=CohortConfig(min_devices=3, carry_rounds=1), rounds=2)
    gkt = replace(gkt, transfer=transfer)
    simulate.run(gkt, few, late=0.4)
    state, before = last_checkpoint(gkt.folder)[1], read_checkpoint(gkt.folder, 1)
    now, then = (GktState.unpack(one, ["resnet8"]).shared("resnet8") for one in (state, before))
    for key, array in now.items():
        same = np.array_equal(array, then[key])
        assert same == key.startswith("extractor."), key


def outputs(gkt, small, name, folder):
    """Logits of held-out images, from a device's exported network and from PyTorch."""
    out = export.export_run(gkt.folder, gkt.runs / "small.onnx", name, small=True).path
    with np.load(folder / "heldout.npz") as held:
        pixels = held["x"].transpose(0, 3, 1, 2).astype(np.float32) / 255
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (gkt.device.mean, gkt.device.std))
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = small.eval()(torch.tensor((pixels - mean) / std)).numpy()
    return session.run(None, {"image": pixels})[0], expected


@pytest.mark.parametrize("strategy", ["fedgkt", "local"])
def test_devices_with_weights_of_their_own_go_on_where_they_stopped(gkt, few, tmp_path, strategy):
    gkt = replace(gkt, strategy=strategy)
    simulate.run(gkt, few)
    halves = replace(gkt, runs=tmp_path / "halves")
    simulate.run(replace(halves, rounds=1), few)
    simulate.run(replace(halves, rounds=2), few)
    simulate.run(halves, few)
    for name, array in weights_of(gkt).items():
        assert np.array_equal(array, weights_of(halves)[name]), name


def test_keep_rate_1_is_fedavg_to_the_bit(config, digits, tmp_path):
    config = replace(config, submodel=SubmodelConfig())
    simulate.run(config, digits)
    plain = replace(config, strategy="fedavg", runs=tmp_path / "plain")
    simulate.run(plain, digits)
    for name, array in weights_of(config).items():
        assert np.array_equal(array, weights_of(plain)[name]), name


def test_error_feedback_sends_later_what_the_codec_left_out():
    ref = BlobRef("ab" * 32, 1, 1024)
    returns = {"update": "eden|b=1|mse"}
    order = Order("run", 1, 1, ref, 1, 0.1, 7, returns, state=ref, feedback=True)
    rng = np.random.default_rng(0)
    owed, sent, wanted = {}, 0.0, 0.0
    for number in range(20):
        update = {"w": rng.standard_normal((64, 64)).astype(np.float32)}
        wanted = wanted + update["w"]
        packed, owed = encode_update(replace(order, seed=number), update, owed)
        sent = sent + tensors.unpack(frames.decode(packed), where="update")["w"]
    assert np.allclose(sent + owed["w"], wanted, atol=1e-3)
    # What is owed stays that of a few rounds; without feedback, the loss grows with every round.
    assert np.square(owed["w"]).sum() < 3 * 64 * 64


def test_an_update_of_any_size_has_its_feedback():
    ref = BlobRef("ab" * 32, 1, 1024)
    order = Order("run", 1, 1, ref, 1, 0.1, 7, {"update": "float16"}, state=ref, feedback=True)
    update = {"w": np.linspace(0, 1, 10**6, dtype=np.float32).reshape(1000, 1000)}
    packed, left = encode_update(order, update, {})
    assert len(packed) > 2 * 10**6
    assert 0 < np.abs(left["w"]).max() < 1e-3


def test_error_feedback_survives_a_simulation_that_is_stopped(config, digits, tmp_path):
    device = replace(config.device, update="eden|b=1|mse", feedback=True)
    config = replace(config, device=device, strategy="fedavg", submodel=SubmodelConfig(), rounds=3)
    simulate.run(config, digits)
    parts = replace(config, runs=tmp_path / "parts")
    for last in (1, 2, 3):
        simulate.run(replace(parts, rounds=last), digits)
    for name, array in weights_of(config).items():
        assert np.array_equal(array, weights_of(parts)[name]), name
    without = replace(config, device=replace(device, feedback=False), runs=tmp_path / "without")
    simulate.run(without, digits)
    assert not np.array_equal(weights_of(config)["global/fc1.weight"],
                              weights_of(without)["global/fc1.weight"])  # fmt: skip


def test_what_cannot_be_simulated_is_refused(config, digits, tmp_path):
    plain = replace(config, name="plain", strategy="fedgkt", submodel=SubmodelConfig())
    with pytest.raises(RunError, match="caldas_cnn has no feature extractor"):
        simulate.run(plain, digits)
    with pytest.raises(RunError, match=r"expected 2 or more files device-\*.npz, found 0"):
        simulate.run(config, tmp_path)
    with pytest.raises(RunError, match="stack: ONNX Runtime trains each device alone"):
        simulate.run(config, digits, engine="onnx", stack=2)
    tiers = SubmodelConfig(1.0, tiers=(Tier(0.5, memory_mb=512),))
    with pytest.raises(RunError, match="simulated devices have no memory to go by; name them"):
        simulate.run(replace(config, submodel=tiers), digits)
    with pytest.raises(RunError, match=r"no result can be used; the first: .*NaN or infinity"):
        simulate.run(replace(config, device=replace(config.device, lr=1e30)), digits)


def test_what_training_made_before_it_diverged_is_not_kept(config, digits):
    """A device continues with its last good weights, as an agent does."""
    chosen = replace(config, strategy="local", submodel=SubmodelConfig())
    with pytest.raises(RunError, match="NaN or infinity"):
        simulate.run(replace(chosen, device=replace(chosen.device, lr=1e30)), digits)
    assert not (config.folder / "own").exists()


@pytest.mark.parametrize("engine", ["torch", "onnx"])
@pytest.mark.parametrize("function", ["begin", "finish"])
def test_a_disk_that_fails_ends_the_run_and_is_not_the_devices_fault(
    config, digits, monkeypatch, function, engine
):
    def fails(*_):
        raise StorageError("runs: read-only")

    monkeypatch.setattr(f"orchestrator.simulation.perform.{function}", fails)
    with pytest.raises(StorageError, match="runs: read-only"):
        simulate.run(config, digits, engine=engine)


@pytest.mark.parametrize(("cls", "name"), [(Kept, "put"), (Local, "admit")])
def test_while_the_disk_is_full_a_devices_work_waits_for_room(
    config, digits, monkeypatch, cls, name
):
    tried, function = [], getattr(cls, name)

    def full_at_first(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise StalledError("full")
        return function(*arguments)

    monkeypatch.setattr(cls, name, full_at_first)
    monkeypatch.setattr("wire.storage.RETRY_S", 0.0)
    report = simulate.run(replace(config, strategy="local", submodel=SubmodelConfig()), digits)
    assert len(report.entries) == 2
    assert len(tried) == 1 + 2 * 2


def test_a_run_goes_on_only_with_the_devices_it_was_begun_with(config, digits, tmp_path):
    first = replace(config, rounds=1)
    simulate.run(first, digits)
    others = tmp_path / "others"
    others.mkdir()
    for n, file in enumerate(sorted(digits.glob("device-*.npz"), reverse=True)):
        (others / f"device-{n}.npz").symlink_to(file)
    with pytest.raises(RunError, match="was begun with 3 simulated devices with data"):
        simulate.run(config, others)
    with pytest.raises(RunError, match="now it is agents; choose another name"):
        Store(config)
    (others / "device-a b.npz").symlink_to(digits / "device-0.npz")
    with pytest.raises(RunError, match="device name 'device-a b': use 1 to 64"):
        simulate.run(config, others)


@pytest.mark.parametrize("honest", [1, 2])
def test_a_device_weighs_no_more_than_ten_median_ones(config, digits, honest):
    device = replace(config.device, state="float32", update="float32")
    config = replace(
        config, strategy="fedavg", submodel=SubmodelConfig(), device=device,
    )  # fmt: skip
    store = Store(config)
    try:
        task = prepare.task(
            config, store, prepare.variants(config), prepare.read_heldout(config),
            Report(config, store),
        )  # fmt: skip
        strategy = create("fedavg", task)
        state = strategy.begin()
        images = devices.read_shards(config, digits)
        births = {name: devices.birth(name, held) for name, held in images.items()}
        orders = strategy.orders(state, 1, 1, births)
        results = []
        for name, samples in zip(births, [100] * honest + [10**12], strict=False):
            update = {n: np.full_like(a, samples > 100) for n, a in task.initial.items()}
            packed, _ = encode_update(orders[name], update, {})
            ref = store.blobs.put(packed)
            results.append(Result(name, store.run_id, 1, 1, samples, blobs={"update": ref}))
        contributions = [strategy.admit(state, orders[r.device], r) for r in results]
        after, _ = strategy.aggregate(state, 1, results, contributions)
    finally:
        store.close()
    moved = after.weights["fc1.bias"] - state.weights["fc1.bias"]
    assert np.allclose(moved, 1000 / (1000 + 100 * honest), atol=1e-5)


@pytest.mark.parametrize("strategy", ["fedavg", "fedgkt"])
def test_a_run_that_was_rolled_back_goes_on(config, gkt, digits, few, strategy):
    chosen, images = (gkt, few) if strategy == "fedgkt" else (config, digits)
    chosen = replace(chosen, strategy=strategy, rounds=4, keep_every=1, submodel=SubmodelConfig())
    if strategy == "fedgkt":
        chosen = replace(chosen, transfer=TransferConfig(extractor="shared", network="shared"))
    whole = simulate.run(chosen, images)
    expected = weights_of(chosen)
    roll_back(chosen.folder, 2)
    again = simulate.run(chosen, images)
    assert [entry["round"] for entry in again.entries] == [1, 2, 3, 4]
    assert again.entries[:2] == whole.entries[:2]
    if strategy == "fedavg":  # to the bit; FedGKT's teachers of round 3 are gone
        for name, array in weights_of(chosen).items():
            assert np.array_equal(array, expected[name]), name
    else:
        assert "server_accuracy" in again.entries[-1]
        assert again.entries[2]["cohort"] == whole.entries[2]["cohort"]


@pytest.mark.parametrize("rule", ["median", "trimmed_mean"])
@pytest.mark.parametrize("strategy", [FedAvg, FedDropout])
def test_a_hostile_device_moves_no_weight_beyond_where_the_others_do(
    config, digits, monkeypatch, strategy, rule
):
    """Device 2 sends its update turned round and a thousand times as long."""
    admit, honest = strategy.admit, {}

    def attacked(self, state, order, result):
        update = admit(self, state, order, result)
        if result.device == "device-2":
            turned = {name: -1000 * array for name, array in update.tensors.items()}
            return replace(update, tensors=turned)
        honest[result.device] = update.tensors
        return update

    monkeypatch.setattr(strategy, "admit", attacked)
    cut = SubmodelConfig(0.5, units="shared", absent="holders")
    device = replace(config.device, state="float32", update="float32")
    config = replace(
        config,
        strategy=strategy.__name__.lower(),
        rounds=1,
        device=device,
        submodel=cut if strategy is FedDropout else SubmodelConfig(),
        cohort=CohortConfig(min_devices=3),
        average=AverageConfig(rule, hostile=0.4),
    )
    (entry,) = simulate.run(config, digits).entries
    after, begun = weights_of(config), distill.weights(prepare.fresh(config))
    for name, start in begun.items():
        furthest = max(np.abs(update[name]).max() for update in honest.values())
        assert np.abs(after[f"global/{name}"] - start).max() <= furthest + 1e-6
    found = {name: each["distance"] for name, each in entry["devices"].items()}
    assert found["device-2"] > 100 * max(found["device-0"], found["device-1"])


def test_what_devices_share_in_fedgkt_is_robust_too(gkt, few, monkeypatch):
    admit, honest = FedGKT.admit, {}

    def attacked(self, state, order, result):
        answer = admit(self, state, order, result)
        if result.device == "device-2":
            turned = {name: -1000 * array for name, array in answer.weights.items()}
            return replace(answer, weights=turned)
        honest[result.device] = answer.weights
        return answer

    monkeypatch.setattr(FedGKT, "admit", attacked)
    gkt = replace(
        gkt,
        rounds=1,
        cohort=CohortConfig(min_devices=3),
        transfer=TransferConfig(extractor="shared", network="shared"),
        average=AverageConfig("median"),
        server=replace(gkt.server, eval_every=9),
    )
    simulate.run(gkt, few)
    _, checkpoint = last_checkpoint(gkt.folder)
    shared = GktState.unpack(checkpoint, {"resnet8": sorted(honest)}).shared("resnet8")
    for name, array in shared.items():
        low, high = (f([each[name] for each in honest.values()], axis=0) for f in (np.min, np.max))
        assert ((array >= low - 1e-6) & (array <= high + 1e-6)).all(), name


ABSENT = ("paho", "onnx", "onnxruntime", "onnxscript", "amqtt", "typer", "rich", "PIL",
          "torchvision", "sklearn", "matplotlib", "zstandard")  # fmt: skip


def test_a_simulation_needs_neither_broker_nor_onnx(gkt, few, tmp_path):
    """PyTorch, numpy, safetensors, msgpack and threadpoolctl are enough."""
    gkt = replace(gkt, rounds=1)
    (tmp_path / "run.json").write_text(json.dumps(records.plain(gkt), default=str))
    code = f"""
import json, sys
for name in {ABSENT!r}:
    sys.modules[name] = None  # an import of it fails
from pathlib import Path
from orchestrator.simulation import simulate
from orchestrator.config import RunConfig
from wire import records
table = json.loads(Path("run.json").read_text())
config = records.build(RunConfig, table, where="run.json", error=ValueError)
report = simulate.run(config, Path({str(few)!r}))
print(report.entries[0]["server_accuracy"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout) <= 1


def test_threads_are_held_for_pytorch_and_numpy():
    before = torch.get_num_threads()
    try:
        simulate.hold_threads(1)
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        assert pools
        assert {pool["num_threads"] for pool in pools} == {torch.get_num_threads()} == {1}
    finally:
        simulate.hold_threads(before)


def test_a_pretrained_run_is_where_both_halves_begin(gkt, few):
    gkt = replace(gkt, rounds=1)
    whole = replace(gkt, name="whole", strategy="fedavg")
    whole = replace(whole, device=replace(DEVICE, model="resnet11"))
    simulate.run(whole, few)
    learnt = weights_of(whole)
    taught = replace(gkt, pretrained=whole.folder)
    device = distill.weights(prepare.fresh(taught))
    for own, there in (("extractor.0.weight", "extractor.0.weight"),
                       ("blocks.0.bn3.running_var", "rest.stages.0.bn3.running_var")):  # fmt: skip
        assert np.array_equal(device[own], learnt[f"global/{there}"])
    before = distill.weights(prepare.fresh(gkt))
    assert np.array_equal(device["fc.weight"], before["fc.weight"])
    simulate.run(taught, few)
    simulate.run(replace(taught, name="anew", pretrained=None), few)
    name = "server/stages.2.conv3.weight"
    start = learnt["global/rest.stages.2.conv3.weight"]
    after, anew = (weights_of(c)[name] for c in (taught, replace(gkt, name="anew")))
    assert np.linalg.norm(after - start) < 0.5 * np.linalg.norm(anew - start)
    with pytest.raises(RunError, match="pretrained: the run began with"):
        simulate.run(replace(taught, pretrained=None), few)
    assert simulate.run(replace(taught, pretrained=Path("gone")), few).entries  # has a copy
    with pytest.raises(RunError, match="has no global model; name a run of fedavg"):
        simulate.run(replace(gkt, name="second", pretrained=taught.folder), few)
    alien = replace(whole, name="alien", device=replace(DEVICE, model="allconv"))
    with pytest.raises(RunError, match="allconv has no layer in common with the model of"):
        simulate.run(replace(alien, pretrained=whole.folder), few)


def test_a_stack_holds_devices_of_one_learning_rate(config, digits, tmp_path):
    """A late device trains at the learning rate of the round in which it got its order."""
    device = replace(DEVICE, schedule="cosine")
    config = replace(config, strategy="local", device=device, submodel=SubmodelConfig(), rounds=3)
    config = replace(config, cohort=CohortConfig(min_devices=3, carry_rounds=1))
    start = {
        f"device/{name}/{n}": array
        for name in devices.read_shards(config, digits)
        for n, array in distill.weights(prepare.fresh(config)).items()
    }
    simulate.run(config, digits, late=0.4, stack=1)
    stacked = replace(config, runs=tmp_path / "stacked")
    simulate.run(stacked, digits, late=0.4, stack=3)
    assert_close(weights_of(stacked), weights_of(config), start, 0.01)


def test_a_stack_holds_devices_whose_strategy_orders_the_same_of_them(
    config, digits, tmp_path, monkeypatch
):
    def orders(*arguments):
        made = ordered(*arguments)
        return {name: replace(made[name], mu=9.0 * n) for n, name in enumerate(sorted(made))}

    ordered = FedAvg.orders
    monkeypatch.setattr(FedAvg, "orders", orders)
    config = replace(config, strategy="fedavg", device=DEVICE, submodel=SubmodelConfig())
    start = start_of(config)
    simulate.run(config, digits, stack=1)
    stacked = replace(config, runs=tmp_path / "stacked")
    simulate.run(stacked, digits, stack=2)
    assert_close(weights_of(stacked), weights_of(config), start, 0.01)


def test_an_order_may_ask_for_no_training(config, digits, monkeypatch):
    def orders(*arguments):
        made = ordered(*arguments)
        return {name: replace(made[name], epochs=n) for n, name in enumerate(sorted(made))}

    ordered = FedAvg.orders
    monkeypatch.setattr(FedAvg, "orders", orders)
    config = replace(config, strategy="fedavg", device=DEVICE, submodel=SubmodelConfig(), rounds=1)
    (entry,) = simulate.run(config, digits, stack=2).entries
    assert ["train_loss" in entry["devices"][name] for name in entry["cohort"]] == [False, True]


@pytest.mark.parametrize("strategy", ["fedgkt", "local"])
def test_rounds_are_evaluated_when_it_is_their_turn(gkt, few, strategy):
    server = replace(gkt.server, eval_every=2, schedule="plateau")
    report = simulate.run(replace(gkt, strategy=strategy, server=server), few)
    told = ["device_accuracy" in entry for entry in report.entries]
    assert told == [False, True, True]  # every second round, and after the last
    if strategy == "fedgkt":
        _, state = last_checkpoint(gkt.folder)
        assert state.notes["schedule"]["last_epoch"] == 2


def test_an_export_takes_the_device_that_did_best_when_it_was_last_looked(tmp_path):
    rounds_ = [
        {
            "server_accuracy": 0.5,
            "device_accuracy": 0.25,
            "devices": {
                "a": {"server_accuracy": 0.1, "device_accuracy": 0.3},
                "b": {"server_accuracy": 0.9, "device_accuracy": 0.2},
            },
        },
        {"devices": {"a": {}, "b": {}}},
    ]
    (tmp_path / "status.json").write_text(json.dumps({"history": rounds_}))
    assert export._best(tmp_path, ["a", "b"]) == "b"
    assert export._best(tmp_path, ["a", "b"], small=True) == "a"
    assert export._best(tmp_path / "nowhere", ["a", "b"]) == "a"


@pytest.mark.parametrize(
    ("strategy", "small", "text"),
    [
        ("local", False, "--small exports a device's"),
        ("fedavg", True, "has one model for all; export without --small"),
        ("fedgkt", True, "no device 'device-9' in .*; there are device-0, device-1, device-2"),
    ],
)
def test_an_export_of_what_is_not_there_is_refused(gkt, few, strategy, small, text):
    gkt = replace(gkt, strategy=strategy, rounds=1, cohort=CohortConfig(min_devices=3))
    simulate.run(gkt, few)
    with pytest.raises(RunError, match=text):
        export.export_run(gkt.folder, gkt.runs / "x.onnx", "device-9", small=small)
    assert not (gkt.runs / "x.onnx").exists()


def test_a_run_goes_on_with_other_settings_of_speed_alone(gkt, few):
    simulate.run(replace(gkt, rounds=1), few)
    quicker = replace(gkt.server, eval_batch=7)
    assert len(simulate.run(replace(gkt, rounds=2, server=quicker), few).entries) == 2
    with pytest.raises(RunError, match=r"server\.lr: the run began with 0\.001"):
        simulate.run(replace(gkt, rounds=3, server=replace(gkt.server, lr=0.5)), few)


# Names of classes


def relabelled(digits, folder, changes):
    """The digits, with other names on some devices, numbered in the order of the names."""
    folder.mkdir()
    for file in digits.glob("*.npz"):
        with np.load(file) as arrays:
            x, y, stored = arrays["x"], arrays["y"], arrays["classes"]
        names = [changes.get(file.stem, {}).get(name, name) for name in stored.tolist()]
        here = [name and n in y and name for n, name in enumerate(names)]
        kept = sorted(filter(None, here))
        chosen = np.array([bool(here[n]) for n in y])
        labels = np.array([kept.index(here[n]) for n in y[chosen]])
        np.savez(folder / file.name, x=x[chosen], y=labels, classes=np.array(kept))
    return folder


@pytest.mark.parametrize("heldout", ["heldout.npz", "plain.npz"], ids=["by name", "by number"])
def test_a_device_with_another_name_is_left_out_and_spoils_nothing(
    config, digits, tmp_path, caplog, heldout
):
    shards = relabelled(digits, tmp_path / "shards", {"device-1": {"7": "Seven"}})
    with np.load(shards / "heldout.npz") as arrays:
        np.savez(shards / "plain.npz", x=arrays["x"], y=arrays["y"])
    chosen = replace(config, rounds=1, heldout=shards / heldout)
    report = simulate.run(chosen, shards)
    (entry,) = report.entries
    assert entry["cohort"] == ["device-0", "device-2"]
    assert any("device-1 is left out: a class is not known: 'Seven';" in m for m in caplog.messages)
    (shards / "device-1.npz").unlink()
    without = replace(chosen, runs=tmp_path / "without")
    assert simulate.run(without, shards).entries[0]["server_accuracy"] == entry["server_accuracy"]
    for name, array in weights_of(without).items():
        assert np.array_equal(array, weights_of(chosen)[name]), name
    written = json.loads((chosen.folder / "report.json").read_text())
    assert written["classes"] == list("0123456789")


def test_devices_that_lack_classes_learn_those_they_have(config, digits, tmp_path):
    """The run lists its classes in another order than sorted folders, and has one more class."""
    lacking = {f"device-{n}": dict.fromkeys(map(str, range(3 * n, 3 * n + 4))) for n in range(3)}
    shards = relabelled(digits, tmp_path / "shards", lacking)
    names = ("9", "7", "5", "3", "1", "0", "2", "4", "6", "8", "ten")
    device = replace(config.device, classes=names)
    chosen = replace(config, device=device, heldout=shards / "heldout.npz", cohort=CohortConfig(3))
    read = devices.read_shards(chosen, shards)
    for name, held in read.items():
        with np.load(digits / f"{name}.npz") as arrays:
            expected = [int(arrays["classes"][n]) for n in arrays["y"]]
        expected = [n for n in expected if str(n) not in lacking[name]]
        assert [int(names[n]) for n in held.y] == expected
    held = prepare.read_heldout(chosen)
    with np.load(digits / "heldout.npz") as arrays:
        assert [int(names[n]) for n in held.y] == arrays["y"].tolist()


def test_heldout_images_of_a_class_that_the_run_does_not_know_are_refused(config, digits, tmp_path):
    shards = relabelled(digits, tmp_path / "shards", {"heldout": {"7": "Seven"}})
    device = replace(config.device, classes=tuple("0123456789"))
    with pytest.raises(DataError, match=r"heldout\.npz: a class is not known: 'Seven'; expected"):
        simulate.run(replace(config, device=device, heldout=shards / "heldout.npz"), shards)
    assert not config.folder.exists()
    few = relabelled(digits, tmp_path / "few", {"heldout": {"7": None}})
    with pytest.raises(DataError, match=r"expected 10 classes, got 9 .* all in run\.toml"):
        simulate.run(replace(config, heldout=few / "heldout.npz"), digits)


def test_names_of_a_run_that_has_begun_stay_though_the_held_out_images_change(
    config, digits, tmp_path
):
    simulate.run(replace(config, rounds=1), digits)
    shards = relabelled(digits, tmp_path / "shards", {"heldout": {"7": "Seven"}})
    with pytest.raises(DataError, match="a class is not known: 'Seven'"):
        simulate.run(replace(config, heldout=shards / "heldout.npz"), digits)
