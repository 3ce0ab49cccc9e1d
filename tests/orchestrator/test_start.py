"""A start that fails leaves no files of its own, and removes none of an earlier start."""

import contextlib
import errno
import os
import shutil
import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models import registry
from orchestrator import broker
from orchestrator.config import BrokerConfig, DeviceConfig, RunConfig, ServerConfig, changes
from orchestrator.fleet import claim, enrolment
from orchestrator.launch import artifacts, prepare, start
from orchestrator.run_folder.store import Store
from orchestrator.simulation import simulate
from orchestrator.strategies import Checkpoint
from orchestrator.training import distill
from tests.conftest import Disk
from wire import records, stopping, storage, tensors
from wire.address import BrokerAddress
from wire.artifact import open_artifact
from wire.errors import ExportError, RunError, StillhouseError


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


DEVICE = DeviceConfig(batch=16, mean=(0.3,) * 3, std=(0.37,) * 3)


@pytest.fixture
def config(tmp_path, digits):
    return RunConfig(
        "run",
        heldout=digits / "heldout.npz",
        runs=tmp_path / "runs",
        broker=BrokerConfig(port=0),
        device=DEVICE,
        server=ServerConfig(model="resnet10"),
    )


class ReadyError(StillhouseError):
    """Raised in place of the first round, when everything is ready for it."""


FAULTS = {
    "no such model": (lambda c: replace(c, device=replace(c.device, model="resnet9")), "resnet9"),
    "no such large model": (
        lambda c: replace(c, server=ServerConfig(model="resnet12")),
        "resnet12",
    ),
    "a model without an extractor": (
        lambda c: replace(c, device=replace(c.device, model="caldas_cnn")),
        "has no feature extractor",
    ),
    "no held-out images": (lambda c: replace(c, heldout=Path("nowhere.npz")), "nowhere.npz"),
    "no run to begin with": (lambda c: replace(c, pretrained=Path("nowhere")), "no round is fin"),
    "a broker that listens elsewhere": (
        lambda c: replace(c, broker=BrokerConfig(host="192.0.2.1", port=1)),
        "loopback",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_failed_start_made_goes_with_it(config, tmp_path, fault):
    change, text = FAULTS[fault]
    before = everything(tmp_path)
    with pytest.raises(StillhouseError, match=text):
        start.run(change(config))
    assert everything(tmp_path) == before


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, digits):
    """The artifact of `config`, compiled once."""
    folder = tmp_path_factory.mktemp("compiled")
    config = RunConfig("run", heldout=digits / "heldout.npz", runs=folder, device=DEVICE)
    with artifacts.compiled(config) as made:
        return shutil.copytree(made / "artifact", folder / "artifact")


@pytest.fixture
def compiled_before(artifact, monkeypatch):
    """Replaces a compilation, which takes seconds, by a copy of an earlier one."""
    monkeypatch.setattr(artifacts, "export", lambda *_, out, **__: shutil.copytree(artifact, out))


@pytest.fixture
def scratch(tmp_path_factory, monkeypatch):
    """The folder in which temporary folders are made."""
    folder = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_network_that_cannot_be_compiled_is_found_before_anything_is_begun(
    config, tmp_path, scratch, monkeypatch
):
    class Odd(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.last = nn.Linear(3 * 32 * 32, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.fft.fft2(x).real.flatten(1))

    entry = registry._Entry(lambda classes, _shape: Odd(classes), (3, 32, 32))
    monkeypatch.setitem(registry._MODELS, "odd", entry)
    for later in ("opened", "serve"):  # no folder is made, and no broker starts
        monkeypatch.setattr(start, later, lambda *_: pytest.fail("it was begun"))
    before = everything(tmp_path)
    with pytest.raises(ExportError):
        start.run(replace(config, strategy="fedavg", device=replace(config.device, model="odd")))
    assert everything(tmp_path) == before
    assert not list(scratch.glob("stillhouse-*"))


def test_what_was_compiled_is_moved_into_the_runs_folder_and_not_compiled_again(
    config, scratch, monkeypatch
):
    def fails(*_: object) -> None:
        raise ReadyError

    monkeypatch.setattr(start, "create", fails)
    with contextlib.closing(Store(config)) as store:
        store.begin(1, {})  # once a run has begun, a failed start removes nothing
    with pytest.raises(ReadyError):
        start.run(config)
    made = open_artifact(config.folder / "artifact")
    assert not list(scratch.glob("stillhouse-*"))
    monkeypatch.setattr(artifacts, "export", lambda *_, **__: pytest.fail("compiled again"))
    with pytest.raises(ReadyError):
        start.run(config)
    assert open_artifact(config.folder / "artifact").digest == made.digest


@pytest.mark.usefixtures("compiled_before")
def test_a_port_that_is_taken_leaves_nothing_and_what_was_there_stays(config, tmp_path):
    enrolment.enroll(config.runs, config.fleet, "pi")
    before = everything(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StillhouseError, match="is in use"):
            start.run(replace(config, broker=BrokerConfig(port=port)))
    del before[str(config.runs / f"fleet-{config.fleet}.json")]  # the orchestrator's password
    after = everything(tmp_path)
    assert after.pop(str(config.runs / f"fleet-{config.fleet}.json"))
    assert after == before


@pytest.mark.usefixtures("compiled_before")
@pytest.mark.parametrize("before_us", ["nothing", "the fleet"])
def test_a_broker_that_was_started_goes_with_the_start_that_failed(
    config, tmp_path, monkeypatch, before_us
):
    if before_us == "the fleet":
        enrolment.enroll(config.runs, config.fleet, "pi")
        claim.lock_file(config.runs, config.fleet).touch()
    before = everything(tmp_path).keys()

    def fails(*_: object) -> None:
        assert enrolment.broker_folder(config.runs, config.fleet).is_dir()
        assert (config.folder / "artifact").is_dir()
        raise ReadyError

    monkeypatch.setattr(start, "create", fails)
    with pytest.raises(ReadyError):
        start.run(config)
    assert everything(tmp_path).keys() == before


class Room(threading.Event):
    """Replaces the wait for a signal: the disk has room as soon as it is waited for."""

    def __init__(self, disk: Disk) -> None:
        super().__init__()
        self.disk, self.waits = disk, 0

    def wait(self, _timeout: float | None = None) -> bool:
        self.disk.make_room()
        self.waits += 1
        return False


@pytest.mark.usefixtures("compiled_before")
@pytest.mark.parametrize("pages", [0, 8, 16, *range(24, 132, 4)])
def test_a_disk_that_is_full_at_any_moment_of_a_start_is_waited_for(
    config, disk, monkeypatch, pages
):
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")

    def ready(*_: object) -> None:
        raise ReadyError

    room = Room(disk)
    monkeypatch.setattr(stopping, "asked", room)
    monkeypatch.setattr(start, "create", ready)
    disk.fill(leave=4096 * pages)
    with pytest.raises(ReadyError):
        start.run(
            replace(config, runs=disk.path / "runs", broker=BrokerConfig("mosquitto", port=0))
        )
    assert room.waits or pages > 100
    assert not (disk.path / "runs").exists()


@pytest.mark.usefixtures("compiled_before")
def test_a_disk_that_is_full_when_pretrained_weights_are_copied_is_waited_for(config, monkeypatch):
    class Asked(threading.Event):
        waits = 0

        def wait(self, _timeout: float | None = None) -> bool:
            Asked.waits += 1
            return False

    def ready(*_: object) -> None:
        raise ReadyError

    write = storage.write

    def full_once(path: Path, content: bytes, *more: int) -> None:
        if path.name == "pretrained.safetensors" and not Asked.waits:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content, *more)

    weights = tensors.with_prefix("global", distill.weights(prepare.fresh(config)))
    monkeypatch.setattr(prepare, "last_checkpoint", lambda _: (1, Checkpoint(weights)))
    monkeypatch.setattr(stopping, "asked", Asked())
    monkeypatch.setattr(storage, "write", full_once)
    monkeypatch.setattr(start, "create", ready)
    with pytest.raises(ReadyError):
        start.run(replace(config, pretrained=Path("elsewhere")))
    assert Asked.waits == 1


@pytest.mark.usefixtures("compiled_before")
def test_a_broker_that_refuses_the_orchestrator_leaves_nothing(config, tmp_path):
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    users = {"orchestrator": "right"}
    running = broker.start(
        "mosquitto", folder=tmp_path / "broker", fleet="fleet", port=0, users=users
    )
    with running, pytest.raises(StillhouseError, match="check username, password"):
        start.run(config, address=BrokerAddress(running.url, "orchestrator", "wrong"))
    assert not config.runs.exists()


def test_a_run_that_has_begun_stays_when_it_cannot_go_on(config):
    with contextlib.closing(Store(config)) as store:
        store.begin(1, {})
    before = everything(config.folder)
    with pytest.raises(StillhouseError, match="loopback"):
        start.run(replace(config, rounds=12, broker=BrokerConfig(host="192.0.2.1")))
    after = everything(config.folder)
    assert after[str(config.folder / "run.json")] == before[str(config.folder / "run.json")]
    assert set(before) <= set(after)


def test_a_damaged_list_of_the_fleet_hides_no_other_reason(config):
    path = enrolment.path(config.runs, config.fleet)
    with contextlib.closing(Store(config)):
        path.write_text("{")
        with pytest.raises(RunError, match="another orchestrator is running this run"):
            start.run(replace(config, admission="open"))
    assert path.read_text() == "{"


def test_a_second_start_takes_nothing_from_the_one_that_runs(config):
    with contextlib.closing(Store(config)):
        before = everything(config.folder)
        with pytest.raises(RunError, match="another orchestrator is running this run"):
            start.run(config)
        assert everything(config.folder) == before


def test_a_simulation_that_cannot_start_leaves_nothing(config, digits):
    with pytest.raises(StillhouseError, match="extractor"):
        simulate.run(replace(config, device=replace(config.device, model="caldas_cnn")), digits)
    assert not config.runs.exists()


def test_other_held_out_images_are_refused_and_the_same_elsewhere_are_not(config, digits, tmp_path):
    fedavg = replace(
        config, strategy="fedavg", rounds=1, device=replace(config.device, model="caldas_cnn")
    )
    simulate.run(fedavg, digits)
    moved = tmp_path / "moved.npz"
    moved.write_bytes(fedavg.heldout.read_bytes())
    simulate.run(replace(fedavg, rounds=2, heldout=moved), digits)
    with pytest.raises(RunError, match="heldout: the run began with other images"):
        simulate.run(replace(fedavg, rounds=3, heldout=digits / "device-0.npz"), digits)
    with pytest.raises(RunError, match="heldout: the run began with other images"):
        simulate.run(replace(fedavg, rounds=3, heldout_limit=10), digits)


def refused(config: RunConfig, round_: int = 3, **values: object) -> list[str]:
    before, now = records.plain(config), records.plain(replace(config, **values))
    return [change.key for change in changes.refused(before, now, round_)]


def test_settings_that_decide_no_number_may_change(config):
    server = replace(config.server, eval_batch=8, torch_device="cpu", compile=True, eval_every=2)
    assert not refused(
        config,
        rounds=3,
        heldout=Path("elsewhere"),
        runs=Path("elsewhere"),
        broker=BrokerConfig("external", url="mqtt://elsewhere"),
        cohort=replace(config.cohort, wait_s=1.0, deadline_s=2.0, quorum=0.5, max_devices=9),
        transfer_chunks=8,
        chunk_bytes=1024,
        server=server,
    )


def test_settings_that_decide_numbers_are_named_by_their_keys(config):
    device = replace(config.device, lr=0.1, mean=(0.5,) * 3)
    assert refused(config, device=device, seed=1) == ["seed", "device.mean", "device.lr"]
    before = records.plain(config)
    (change,) = changes.refused(before, records.plain(replace(config, seed=1)), 0)
    assert str(change) == "seed: the run began with 0, run.toml says 1"


def test_rounds_end_no_earlier_than_the_run_is_and_decide_no_learning_rate(config):
    assert refused(config, rounds=2) == ["rounds"]
    for part in ("device", "server"):
        cosine = replace(config, **{part: replace(getattr(config, part), schedule="cosine")})
        assert refused(cosine, rounds=20) == ["rounds"]
    plateau = replace(config, server=replace(config.server, schedule="plateau"))
    assert refused(plateau, server=replace(plateau.server, eval_every=2)) == ["server.eval_every"]
