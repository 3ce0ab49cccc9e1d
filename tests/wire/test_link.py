"""The connection: what one thread publishes is never torn by another."""

import queue
import threading

import pytest
from paho.mqtt import client as paho

from wire.address import BrokerAddress
from wire.link import Arrived, Connected, Link

BODY = bytes(300_000)


@pytest.fixture
def link(any_broker):
    events = queue.SimpleQueue()
    link = Link(BrokerAddress(any_broker.url), "one", subscriptions=[("t/#", 1)], emit=events.put)
    link.events = events
    link.start()
    assert isinstance(events.get(timeout=120), Connected)
    yield link
    link.close()


def test_large_messages_of_another_thread_arrive_whole_and_in_order(link):
    for number in range(30):
        link.publish("t/a", number.to_bytes(4, "little") + BODY)
    for number in range(30):
        event = link.events.get(timeout=120)
        assert isinstance(event, Arrived)
        assert event.payload == number.to_bytes(4, "little") + BODY


def test_only_the_threads_of_the_connection_write_to_it(link, monkeypatch):
    """Two threads that write would tear each other's messages wherever one is sent in part."""
    writers = set()
    write = paho.Client.loop_write

    def noted(client):
        writers.add(threading.current_thread().name)
        return write(client)

    monkeypatch.setattr(paho.Client, "loop_write", noted)
    for _ in range(10):
        link.publish("t/a", BODY)
        assert isinstance(link.events.get(timeout=120), Arrived)
    assert writers == {"mqtt"}
