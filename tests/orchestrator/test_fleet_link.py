"""The orchestrator's edge: messages are decoded once, and undecodable ones are dropped there."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.config import RunConfig
from orchestrator.fleet.claim import ANSWER_S
from orchestrator.loop import fleet_link
from orchestrator.loop.fleet_link import FleetLink, Heard
from wire import messages
from wire.address import BrokerAddress
from wire.link import Arrived, Connected
from wire.messages import Death


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
