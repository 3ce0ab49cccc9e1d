"""The orchestrator's edge: messages are decoded once, and undecodable ones are dropped there."""

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from orchestrator.config import RunConfig
from orchestrator.fleet.claim import ANSWER_S
from orchestrator.loop import fleet_link
from orchestrator.loop.fleet_link import FleetLink, Heard
from orchestrator.rules import budgets
from wire import messages
from wire.address import BrokerAddress
from wire.blobs import BlobStore
from wire.link import Arrived, Connected
from wire.messages import Chunk, Death, Want


@pytest.fixture
def counted():
    return []


@pytest.fixture
def link(counted):
    """A link that is never started, to a broker that does not exist."""
    report = SimpleNamespace(
        received=lambda device, count: counted.append((device, count)),
        sent=lambda device, count: counted.append((device, -count)),
    )
    config = RunConfig(name="run", fleet="home", heldout=Path("heldout.npz"))
    address = BrokerAddress("mqtt://127.0.0.1:9")
    return FleetLink(config, "run.0a", address, report=report, emit=lambda _: None)


def test_a_message_is_heard_from_the_device_whose_topic_it_came_on(link, counted):
    payload = messages.encode(Death("somebody", 7))
    heard = link.read(Arrived("stillhouse/1/home/pi/death", payload))
    assert heard == Heard("pi", Death("somebody", 7), b"")
    assert counted == [("pi", len(payload))]


@pytest.mark.parametrize(
    ("topic", "payload"),
    [("stillhouse/1/home/pi/death", b"noise"), ("elsewhere", messages.encode(Death("pi", 7))),
     ("stillhouse/1/home/all/run", b"noise"), ("stillhouse/1/home/pi/telemetry", b"")],
    ids=["no frame", "no topic of ours", "no claim", "what we took from the broker"],
)  # fmt: skip
def test_what_cannot_be_read_is_dropped_and_counted_for_nobody(link, counted, topic, payload):
    assert link.read(Arrived(topic, payload)) is None
    assert counted == []


def test_the_fleet_is_ours_once_nobody_has_answered_for_it(link):
    link.read(Connected())
    now = time.monotonic()
    assert not link.ticked(now)
    assert link.ticked(now + 2 * ANSWER_S)


def test_more_messages_than_a_device_may_send_are_dropped_and_told_once(link, counted, caplog):
    topic, payload = "stillhouse/1/home/pi/death", messages.encode(Death("pi", 7))
    heard = [link.read(Arrived(topic, payload)) for _ in range(int(2 * budgets.MESSAGES))]
    dropped = heard.count(None)
    assert 0.8 * budgets.MESSAGES < dropped <= budgets.MESSAGES
    assert len(counted) == len(heard) - dropped
    (told,) = [record.message for record in caplog.records]
    assert told == "pi sends or asks for too much: what goes beyond is dropped"
    assert link.read(Arrived("stillhouse/1/home/other/death", payload))


def test_a_chunk_is_read_only_if_it_was_asked_for(link, caplog):
    topic, chunk = "stillhouse/1/home/pi/up", messages.encode(Chunk("ab" * 32, 0), b"x" * 900)
    assert link.read(Arrived(topic, chunk)) is None
    link.send("pi", "down", Want("ab" * 32, 1024, (0, 1)))
    assert [bool(link.read(Arrived(topic, chunk))) for _ in range(3)] == [True, True, False]
    assert not caplog.records


def test_a_device_is_sent_only_so_many_bytes(link, counted, tmp_path, caplog, monkeypatch):
    store = BlobStore(tmp_path)
    want = Want(store.put(bytes(64 << 10)).digest, 64 << 10, (0,) * 64)
    client, mids = link._link._client, itertools.count(1)
    monkeypatch.setattr(client, "is_connected", lambda: True)
    monkeypatch.setattr(
        client, "publish", lambda *_, **__: SimpleNamespace(rc=0, mid=next(mids) % 65535)
    )
    monkeypatch.setattr(budgets, "DOWNLOAD_BYTES", float(80 << 20))
    for name in ("pi", "other", "pi"):
        for _ in range(50):
            link.answer(name, want, store)
    sent = -sum(count for _, count in counted)
    assert fleet_link.QUEUED_BYTES <= sent < fleet_link.QUEUED_BYTES + (5 << 20)
    assert link._link.queued_bytes == sent, "the broker takes nothing"
    assert not caplog.records
    for _ in range(10):  # it takes all: those who wait are answered, one question of each
        before = len(counted)
        link._link._disconnected(None, None, None, ReasonCode(PacketTypes.DISCONNECT), None)
        link.ticked(0.0)
        link.answer("pi", want, store)
    assert {device for device, _ in counted[before:]} <= {"pi", "other"}
    assert "pi sends or asks for too much" in caplog.text


def test_names_that_anybody_invents_fill_neither_the_report_nor_the_journal(
    link, counted, monkeypatch
):
    monkeypatch.setattr(fleet_link, "COUNTED", 2)
    for name in ("a", "b", "c", "a"):
        heard = link.read(
            Arrived(f"stillhouse/1/home/{name}/death", messages.encode(Death(name, 7)))
        )
        assert heard.device == name
    link.send("c", "order", Death("c", 7))
    link.send("b", "order", Death("b", 7))
    assert [device for device, _ in counted] == ["a", "b", "a", "b"]
