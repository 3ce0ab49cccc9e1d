"""Whose fault it is, and which word of a device counts: one coordinator, without a broker."""

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet.updates import Rollout
from orchestrator.loop.coordinator import Coordinator
from orchestrator.loop.fleet_link import Heard
from orchestrator.rules.attempt import Attempt
from orchestrator.run_folder.store import Store
from wire.address import BrokerAddress
from wire.errors import StalledError, StorageError, TransferError
from wire.messages import Birth, BlobRef, Chunk, Order, Platform, Result

MACHINE = Platform("Pi", "aarch64", 4, 2**30, "3.11", "1.31")
REF = BlobRef("ab" * 32, 1000, 1024)


def birth(session: int, samples: int) -> Birth:
    return Birth("pi", session, "0.1.0", samples, "cd" * 32, MACHINE, state_id="0a")


@pytest.fixture
def loop(tmp_path):
    """Round 1 is open, and the device `pi` has its order; the link is never started."""
    config = RunConfig(name="run", heldout=Path("heldout.npz"), runs=tmp_path)
    with contextlib.closing(Store(config)) as store:
        order = Order(store.run_id, 1, 1, REF, 1, 0.1, 7, {"update": "float32"}, REF)
        store.begin(1, {"pi": order})
        strategy = SimpleNamespace(
            begin=lambda: None, task=SimpleNamespace(limits={"update": 2000})
        )
        made = Coordinator(
            config,
            store,
            strategy,
            enrolled=None,
            address=BrokerAddress("mqtt://127.0.0.1:9"),
            report=Report(config, store),
            rollout=Rollout(),
        )
        yield made
        made._worker.end(wait=True)


def hear(loop: Coordinator, message: object, body: bytes = b"") -> None:
    loop._received(Heard("pi", message, memoryview(body)))


def failing(fault: Exception):
    def work(*_: object) -> None:
        raise fault

    return work


def attempt(loop: Coordinator) -> Attempt:
    """The open round, as the journal has it."""
    return loop.store.last_attempt()


def test_a_file_that_we_have_lost_ends_the_run_and_is_not_noted_against_the_device(
    loop, monkeypatch
):
    hear(loop, birth(1, 10))
    fault = FileNotFoundError(2, "No such file or directory", str(loop.store.folder / "blobs/x"))
    monkeypatch.setattr(loop._intake, "take", failing(fault))
    with pytest.raises(StorageError, match="blobs/x"):
        hear(loop, Chunk("ab" * 32, 0), b"bytes")
    assert attempt(loop).verdicts == {}


def test_a_wrong_chunk_is_noted_against_its_device(loop, monkeypatch):
    hear(loop, birth(1, 10))
    monkeypatch.setattr(loop._intake, "take", failing(TransferError("chunk 7 of 1")))
    hear(loop, Chunk("ab" * 32, 7), b"bytes")
    assert attempt(loop).verdicts["pi"].reason == "chunk 7 of 1"


def test_the_deadline_waits_while_the_disk_is_full(loop, monkeypatch):
    hear(loop, birth(1, 10))
    before_s = loop._round.state.deadline_s
    monkeypatch.setattr(loop._intake, "take", failing(StalledError("the disk is full")))
    hear(loop, Chunk("ab" * 32, 0), b"bytes")
    loop._tick(time.monotonic() + 50)
    assert loop._round.state.deadline_s >= before_s + 50


def test_a_birth_that_comes_after_that_of_a_newer_session_changes_nothing(loop):
    hear(loop, birth(2, 10))
    hear(loop, birth(1, 9))
    hear(loop, Result("pi", loop.store.run_id, 1, 1, 10, blobs={"update": REF}))
    assert attempt(loop).verdicts == {}, "its number of samples is that of the newer session"
    assert "pi" in loop._intake._pulls
