"""The connection: published messages stay whole, and the cause of a disturbance is named."""

import queue
import shutil
import socket
import subprocess
import threading
import time

import pytest
from paho.mqtt import client as paho

from wire.address import BrokerAddress
from wire.errors import LinkError
from wire.link import (
    BACKOFF_CAP_S,
    CUTS,
    LARGE_BYTES,
    STEADY_S,
    Arrived,
    Backoff,
    Connected,
    Link,
    Lost,
)

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


def test_what_waits_here_is_counted_until_the_broker_has_it(link):
    body = b"x" * 50_000
    for number in range(200):
        link.publish("stillhouse/1/f/d/up", body, qos=number % 2)
    deadline = time.monotonic() + 60
    while link.queued_bytes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert link.queued_bytes == 0
    assert not link._queue
    link.close()
    link.publish("stillhouse/1/f/d/up", body, qos=0)
    assert link.queued_bytes == 0, "it is dropped without a connection"


def test_only_the_threads_of_the_connection_write_to_it(link, monkeypatch):
    """If two threads wrote, a message that is sent in parts could be torn by another."""
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


def cut(backoff: Backoff, now_s: float, *, stood_s: float = 1.0, large: int = 0) -> str:
    """The cause that is given when the broker ends a connection after `stood_s`."""
    backoff.connected(now_s)
    if large:
        backoff.published(large, now_s + stood_s)
    return backoff.ended(now_s + stood_s, by_broker=True)


def test_the_back_off_begins_anew_only_when_a_connection_has_stood():
    backoff = Backoff("pi", "")
    ceilings = []
    for number in range(12):
        ceilings.append(backoff.ceiling_s())
        cut(backoff, 100.0 * number)
    assert ceilings[:4] == [0.5, 1.0, 2.0, 4.0]
    assert ceilings[-1] == BACKOFF_CAP_S < STEADY_S  # so two rivals never count as steady
    cut(backoff, 0.0, stood_s=STEADY_S)
    assert backoff.ceiling_s() == 0.5


def test_connections_that_the_broker_keeps_ending_are_told_to_be_another_client_of_the_name():
    backoff = Backoff("pi", "look for the other one")
    told = [cut(backoff, number) for number in range(CUTS)]
    assert told[:-1] == [""] * (CUTS - 1)
    assert "another client uses this name, pi; look for the other one" in told[-1]


def test_ends_that_each_follow_a_large_message_are_told_to_be_because_of_it():
    backoff = Backoff("pi", "")
    told = [cut(backoff, number, large=135_000 + number) for number in range(CUTS)]
    assert told[:-1] == [""] * (CUTS - 1)
    assert "sent a message of about 135,000 bytes" in told[-1]
    assert "chunk_bytes" in told[-1]
    assert "max_packet_size" in told[-1]
    assert cut(backoff, 9.0, large=LARGE_BYTES - 1) == ""  # neither cause is certain any more


def test_a_broker_that_comes_and_goes_and_a_network_that_breaks_are_no_rivals():
    backoff = Backoff("pi", "")
    for number in range(3 * CUTS):
        assert cut(backoff, number) == ""
        backoff.unreachable()
        backoff.connected(number)
        assert backoff.ended(number + 1, by_broker=False) == ""


def test_two_clients_of_one_name_are_told_so_by_each_broker(any_broker):
    events: queue.SimpleQueue = queue.SimpleQueue()
    address = BrokerAddress(any_broker.url)
    pair = [
        Link(address, "pi", subscriptions=[], emit=events.put, persistent=True, rival="find it")
        for _ in range(2)
    ]
    for one in pair:
        one.start()
        assert one.wait_connected(20)
    text = ""
    while "another client uses this name, pi; find it" not in text:
        event = events.get(timeout=60)
        text = event.reason if isinstance(event, Lost) else ""
    for one in pair:
        one.close()


def lost(url: str, **files: object) -> str:
    """The first reason why the connection fails."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    link = Link(BrokerAddress(url, **files), "pi", subscriptions=[], emit=events.put)
    link.start()
    event = events.get(timeout=20)
    link.close()
    assert isinstance(event, Lost)
    return event.reason


def test_a_port_that_answers_no_mqtt_is_told_so():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            server.accept()[0].close()

        threading.Thread(target=hang_up).start()
        assert "ended without an answer" in lost(f"mqtt://127.0.0.1:{port}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as below
def test_a_password_for_a_tls_url_in_capitals_never_crosses_the_network_in_the_clear():
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(4096))

        listener = threading.Thread(target=listen)
        listener.start()
        url = f"MQTTS://127.0.0.1:{server.getsockname()[1]}"
        lost(url, username="pi", password="tops3cret")
        listener.join(20)
    (first,) = heard
    assert first[:1] == b"\x16"  # a TLS handshake
    assert b"tops3cret" not in first


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_on_a_port_without_it_is_told_so(any_broker):
    said = lost(f"mqtts://127.0.0.1:{BrokerAddress(any_broker.url).port}")
    assert "does it speak TLS on that port?" in said


@pytest.mark.parametrize("what", ["no PEM", "a key with a password"])
def test_files_that_cannot_be_used_are_a_link_error(what, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text("nothing")
    key.write_text("nothing")
    if what == "a key with a password":
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        make = f"openssl req -x509 -newkey rsa:2048 -keyout {key} -out {cert} -subj /CN=x"
        subprocess.run([*make.split(), "-passout", "pass:x"], check=True, capture_output=True)
    address = BrokerAddress("mqtts://127.0.0.1:9", cert_file=cert, key_file=key)
    with pytest.raises(LinkError, match="ca_file, cert_file and key_file must be"):
        Link(address, "pi", subscriptions=[], emit=lambda _: None)
