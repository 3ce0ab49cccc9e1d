"""The real brokers that the orchestrator runs, with real clients in real processes."""

import contextlib
import itertools
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from orchestrator import broker
from orchestrator.broker import mosquitto
from wire import topics
from wire.errors import BrokerError

FLEET = "attic"
WAIT_S = 60.0
PUBLISHED = Path(__file__).parents[2] / "hardware" / "broker"
USERS = {"orchestrator": "o:$ü", "a": "pass a", "b": "pass b"}
needs_mosquitto = pytest.mark.skipif(broker.find() is None, reason="mosquitto is not installed")
both = pytest.mark.parametrize(
    "kind", [pytest.param("mosquitto", marks=needs_mosquitto), "embedded"]
)
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


class Client:
    """A paho client that waits for the end of every operation."""

    def __init__(self, url, name, *, user=None, password=None, clean=True, will=None, tls=None):
        self.messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.answers: queue.Queue[object] = queue.Queue()
        self.gone = threading.Event()
        self.paho = client = paho.Client(
            CallbackAPIVersion.VERSION2, name, clean_session=clean, reconnect_on_failure=False
        )
        client.max_queued_messages_set(0)
        if user is not None:
            client.username_pw_set(user, USERS[user] if password is None else password)
        if will is not None:
            client.will_set(*will)
        if tls is not None:
            client.tls_set(str(tls / "ca.pem"), str(tls / f"{user}.pem"), str(tls / f"{user}.key"))
        client.on_connect = lambda _c, _u, flags, code, _p: self.answers.put((flags, code))
        client.on_subscribe = lambda _c, _u, _m, codes, _p: self.answers.put(codes)
        client.on_message = lambda _c, _u, m: self.messages.put((m.topic, bytes(m.payload)))
        client.on_disconnect = lambda *_: self.gone.set()
        parts = urlsplit(url)
        client.connect(parts.hostname, parts.port)
        client.loop_start()
        self.flags, self.code = self.answers.get(timeout=WAIT_S)

    def subscribe(self, channel, device="+"):
        self.paho.subscribe(topics.topic(FLEET, device, channel), qos=1)
        return self.answers.get(timeout=WAIT_S)

    def publish(self, device, channel, payload, *, qos=1, retain=False):
        topic = topics.topic(FLEET, device, channel)
        self.paho.publish(topic, payload, qos, retain).wait_for_publish(WAIT_S)

    def get(self):
        topic, payload = self.messages.get(timeout=WAIT_S)
        return topic.removeprefix(f"{topics.ROOT}/{FLEET}/"), payload

    def close(self):
        self.paho.disconnect()
        self.gone.wait(WAIT_S)
        self.paho.loop_stop()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as stack:

        def make(*args, **options) -> Client:
            client = Client(*args, **options)
            stack.callback(client.close)
            return client

        yield make


DEVICE = """
import sys, paho.mqtt.client as paho
port, name, topic, keepalive = int(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
client = paho.Client(
    paho.CallbackAPIVersion.VERSION2, name, clean_session=False, manual_ack=True)
client.will_set(topic + "/death", b"gone", 1, retain=True)
client.on_connect = lambda *_: client.subscribe(topic + "/order", 1)
client.on_subscribe = lambda *_: print("ready", flush=True)
client.on_message = lambda c, u, m: print("got", m.payload.decode(), flush=True)
client.connect("127.0.0.1", port, keepalive)
client.loop_forever()
"""


@contextlib.contextmanager
def device_process(url: str, *, keepalive: int = 60) -> Iterator["subprocess.Popen[str]"]:
    """The device `a` in its own process: subscribes to its orders, but never acknowledges any."""
    port = str(urlsplit(url).port)
    command = [sys.executable, "-c", DEVICE, port, "a", f"{topics.ROOT}/{FLEET}/a", str(keepalive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for: {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@both
def test_anybody_may_talk_when_there_are_no_users(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path / "new", fleet=FLEET, port=0) as running:
        assert running.kind == kind
        assert alive(running.pid)
        reader, writer = connect(running.url, "r"), connect(running.url, "w")
        reader.subscribe("up")
        writer.publish("a", "up", b"hello")
        assert reader.get() == ("a/up", b"hello")
    assert not running.running
    assert not alive(running.pid)
    running.stop()


@both
def test_a_burst_of_chunks_arrives_whole_and_in_order(kind, tmp_path, connect):
    body = os.urandom(128 * 1024 + 400)
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        for qos in (0, 1):
            reader, writer = connect(running.url, f"r{qos}"), connect(running.url, f"w{qos}")
            reader.subscribe("up")
            topic = topics.topic(FLEET, "a", "up")
            for number in range(200):
                writer.paho.publish(topic, number.to_bytes(4, "big") + body, qos)
            for number in range(200):
                assert reader.get() == ("a/up", number.to_bytes(4, "big") + body)


@both
def test_only_the_right_password_opens(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0, users=USERS) as running:
        for user in USERS:
            assert not connect(running.url, f"right-{user}", user=user).code.is_failure
        assert connect(running.url, "wrong", user="a", password=USERS["b"]).code.is_failure
        assert connect(running.url, "empty", user="a", password="").code.is_failure
        assert connect(running.url, "nobody").code.is_failure
        private = {p.name for p in tmp_path.iterdir() if not p.stat().st_mode & 0o077}
        assert {"passwd"} | ({"acl", "mosquitto.conf"} if kind == "mosquitto" else set()) <= private
        assert "pass a" not in (tmp_path / "passwd").read_text()


@both
def test_a_device_that_is_enrolled_meanwhile_is_let_in_and_nobody_else_is_sent_away(
    kind, tmp_path, connect
):
    before = {user: USERS[user] for user in ("orchestrator", "a")}
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0, users=before) as running:
        server = connect(running.url, "server", user="orchestrator")
        device = connect(running.url, "a", user="a")
        server.subscribe("#", "+")
        names = (f"b-{number}" for number in itertools.count())
        assert connect(running.url, next(names), user="b").code.is_failure
        broker.let_in(tmp_path, USERS)
        until(lambda: not connect(running.url, next(names), user="b").code.is_failure, "b is in")
        assert not (tmp_path / "passwd").stat().st_mode & 0o077
        connect(running.url, "b", user="b").publish("b", "birth", b"here")
        assert server.get() == ("b/birth", b"here")
        device.publish("a", "birth", b"still here")
        assert server.get() == ("a/birth", b"still here")
        assert not device.gone.is_set()
        assert connect(running.url, "wrong", user="b", password="pass a").code.is_failure


@both
def test_a_device_that_is_revoked_is_cut_off_and_nobody_else_is(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0, users=USERS) as running:
        server = connect(running.url, "server", user="orchestrator")
        server.subscribe("#", "+")
        devices = {name: connect(running.url, name, user=name) for name in "ab"}
        broker.let_in(tmp_path, {user: USERS[user] for user in ("orchestrator", "a")})
        names = (f"b-{number}" for number in itertools.count())
        until(lambda: connect(running.url, next(names), user="b").code.is_failure, "b is out")
        assert devices["b"].gone.wait(WAIT_S), "its connection ends"
        devices["a"].publish("a", "birth", b"still here")
        assert server.get() == ("a/birth", b"still here")


def test_where_nobody_is_asked_for_a_password_none_is_written(tmp_path):
    broker.let_in(tmp_path, USERS)
    assert not list(tmp_path.iterdir())


@both
def test_a_device_reaches_its_own_topics_only(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0, users=USERS) as running:
        server = connect(running.url, "server", user="orchestrator")
        device = connect(running.url, "device", user="a")
        server.subscribe("#", "+")
        for name, channel in (("b", "order"), ("a", "order"), ("a", "down"), ("all", "+")):
            device.subscribe(channel, name)
        server.publish("b", "order", b"for b alone")
        for name, channel in (("a", "order"), ("a", "down"), ("all", "notice")):
            server.publish(name, channel, b"for a")
        for expected in ("b/order", "a/order", "a/down", "all/notice"):
            assert server.get()[0] == expected
        for expected in ("a/order", "a/down", "all/notice"):
            assert device.get() == (expected, b"for a")

        for name, channel in (("b", "up"), ("b", "death"), ("a", "order"), ("all", "notice")):
            device.publish(name, channel, b"forged")
        for channel in topics.FROM_DEVICE:
            device.publish("a", channel, b"true")
        for channel in topics.FROM_DEVICE:
            assert server.get() == (f"a/{channel}", b"true")
        assert device.messages.empty()


def test_embedded_refuses_a_will_for_another_device(tmp_path, connect):
    with broker.start("embedded", folder=tmp_path, fleet=FLEET, port=0, users=USERS) as running:
        own, others = ((topics.topic(FLEET, name, "death"), b"gone", 1) for name in "ab")
        assert not connect(running.url, "own", user="a", will=own).code.is_failure
        assert connect(running.url, "others", user="a", will=others).code.is_failure


@both
def test_the_will_of_a_killed_device_is_delivered_and_retained(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        server = connect(running.url, "server")
        server.subscribe("death")
        with device_process(running.url) as device:
            device.kill()
            assert server.get() == ("a/death", b"gone")
        late = connect(running.url, "late")
        late.subscribe("death")
        assert late.get() == ("a/death", b"gone")


def test_embedded_notices_a_frozen_device(tmp_path, connect):
    with broker.start("embedded", folder=tmp_path, fleet=FLEET, port=0) as running:
        server = connect(running.url, "server")
        server.subscribe("death")
        with device_process(running.url, keepalive=1) as device:
            device.send_signal(signal.SIGSTOP)
            assert server.get() == ("a/death", b"gone")


@both
def test_a_device_that_comes_back_early_takes_over_its_session(kind, tmp_path, connect):
    death = topics.topic(FLEET, "a", "death")
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        server = connect(running.url, "server")
        server.subscribe("death")
        first = connect(running.url, "a", clean=False, will=(death, b"session 1", 1))
        first.subscribe("order", "a")
        second = connect(running.url, "a", clean=False, will=(death, b"session 2", 1))
        assert first.gone.wait(WAIT_S)
        server.publish("a", "order", b"train")
        assert second.get() == ("a/order", b"train")
        # Mosquitto does not send the first will here, amqtt does; neither sends the second.
        second.publish("b", "death", b"marker")
        deaths = list(iter(server.get, ("b/death", b"marker")))
        assert deaths == ([("a/death", b"session 1")] if kind == "embedded" else [])


@both
def test_a_retained_birth_reaches_its_readers_and_nobody_else(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        early, device = connect(running.url, "early"), connect(running.url, "a")
        early.subscribe("birth")
        device.publish("a", "birth", b"born", retain=True)
        assert early.get() == ("a/birth", b"born")
        device.close()
        late, other = connect(running.url, "late"), connect(running.url, "b")
        late.subscribe("birth")
        assert late.get() == ("a/birth", b"born")
        other.subscribe("order", "b")
        late.publish("b", "order", b"train")
        assert other.get() == ("b/order", b"train")
        late.publish("a", "birth", b"", retain=True)
        assert late.get() == ("a/birth", b"")
        later = connect(running.url, "later")
        later.subscribe("birth")
        late.publish("c", "birth", b"born")
        assert later.get() == ("c/birth", b"born")


@both
def test_a_persistent_session_gets_what_it_missed(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        server, device = connect(running.url, "server"), connect(running.url, "a", clean=False)
        device.subscribe("order", "a")
        device.close()
        orders = [f"order {n}".encode() for n in range(50)]
        for order in orders:
            server.publish("a", "order", order)
        device = connect(running.url, "a", clean=False)
        assert device.flags.session_present
        assert [device.get() for _ in orders] == [("a/order", order) for order in orders]


@both
def test_an_order_that_a_killed_device_never_acknowledged_comes_again(kind, tmp_path, connect):
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        server = connect(running.url, "server")
        server.subscribe("death")
        with device_process(running.url) as device:
            server.publish("a", "order", b"train")
            assert device.stdout.readline() == "got train\n"
            device.kill()
            assert server.get() == ("a/death", b"gone")
        assert connect(running.url, "a", clean=False).get() == ("a/order", b"train")


@needs_mosquitto
def test_mosquitto_killed_and_started_again_still_has_what_it_saved(tmp_path, connect, monkeypatch):
    monkeypatch.setattr(mosquitto, "AUTOSAVE_S", 1)
    saved = tmp_path / "mosquitto.db"
    options = {"folder": tmp_path, "fleet": FLEET, "port": 0}
    with broker.start("mosquitto", **options) as running:
        server, device = connect(running.url, "server"), connect(running.url, "a", clean=False)
        device.subscribe("order", "a")
        device.close()
        server.publish("a", "order", b"a queued order")
        server.publish("a", "birth", b"a retained birth", retain=True)
        for text in (b"a queued order", b"a retained birth"):
            until(lambda text=text: saved.exists() and text in saved.read_bytes(), "the autosave")
        killed = running.pid
        os.kill(killed, signal.SIGKILL)
        until(lambda: running.pid != killed and listening(running.url), "another Mosquitto")
        assert running.running
        device = connect(running.url, "a", clean=False)
        assert device.get() == ("a/order", b"a queued order")
    with broker.start("mosquitto", **options) as running:
        late = connect(running.url, "late")
        late.subscribe("birth")
        assert late.get() == ("a/birth", b"a retained birth")


def listening(url: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", urlsplit(url).port)):
        return True
    return False


@both
def test_the_number_of_an_earlier_broker_is_forgotten_first(kind, tmp_path, monkeypatch):
    noted, popen = tmp_path / "broker.pid", subprocess.Popen
    noted.write_text("1")

    def starting(*args, **options):
        assert not noted.exists()
        return popen(*args, **options)

    monkeypatch.setattr(broker.subprocess, "Popen", starting)
    with broker.start(kind, folder=tmp_path, fleet=FLEET, port=0) as running:
        assert alive(running.pid)
        assert running.pid != 1


@needs_mosquitto
def test_mosquitto_ends_with_the_process_that_watches_it(tmp_path):
    with broker.start("mosquitto", folder=tmp_path, fleet=FLEET, port=0) as running:
        running._child.kill()
        until(lambda: not alive(running.pid), "the end of Mosquitto")
        assert not running.running


PARENT = """
import os, sys, time
from pathlib import Path
from orchestrator import broker
running = broker.start(sys.argv[1], folder=Path(sys.argv[2]), fleet="attic", port=0)
worker = os.fork()  # like a data loader's: it inherits our end of the pipe, and outlives us
if worker:
    print(running.url, running.pid, worker, flush=True)
time.sleep(3600)
"""


@both
def test_the_broker_ends_when_the_orchestrator_is_killed(kind, tmp_path):
    command = [sys.executable, "-c", PARENT, kind, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        url, pid, worker = parent.stdout.readline().split()
        assert listening(url)
        parent.kill()
        try:
            until(lambda: not listening(url) and not alive(int(pid)), "the end of the broker")
        finally:
            os.kill(int(worker), signal.SIGKILL)


@both
def test_a_port_in_use_is_named_with_its_remedy(kind, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            BrokerError, match=rf"port {port} on 127\.0\.0\.1 is in use.*another port"
        ):
            broker.start(kind, folder=tmp_path, fleet=FLEET, port=port)


@both
def test_a_free_port_that_another_program_takes_first_is_given_up_for_the_next(
    kind, tmp_path, monkeypatch
):
    claim = broker._claim
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        monkeypatch.setattr(
            broker, "_claim", lambda host, port: claim(host, port) if folder.exists() else taken
        )
        folder = tmp_path / "new"
        with broker.start(kind, folder=folder, fleet=FLEET, port=0) as running:
            assert urlsplit(running.url).port != taken
            assert listening(running.url)


def test_a_missing_mosquitto_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(mosquitto, "SBIN", ())
    with pytest.raises(BrokerError, match="sudo apt install mosquitto"):
        broker.start("mosquitto", folder=tmp_path, fleet=FLEET, port=0)


@needs_mosquitto
def test_a_mosquitto_that_dies_at_start_shows_its_log(tmp_path):
    (tmp_path / "mosquitto.db").write_text("not what Mosquitto saved")
    with pytest.raises(BrokerError, match=r"(?s)died at start.*broker\.log.*persistent database"):
        broker.start("mosquitto", folder=tmp_path, fleet=FLEET, port=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "loopback only, not on '0.0.0.0'"),  # noqa: S104
        ({"host": "example.org"}, "loopback only"),
        ({"fleet": "a/b"}, "fleet 'a/b'"),
        ({"users": {"all": "x"}}, "broker user 'all'"),
        ({"users": {"x\ny:": "x"}}, "broker user"),
        ({"kind": "emqx"}, "expected 'mosquitto' or 'embedded'"),
    ],
)
def test_what_cannot_work_is_refused_at_once(tmp_path, options, message):
    with pytest.raises(BrokerError, match=message):
        broker.start(
            **{"kind": "embedded", "folder": tmp_path, "fleet": FLEET, "port": 0} | options
        )


def test_the_watching_process_is_light():
    check = (
        "import sys, orchestrator.broker.__main__\n"
        "sys.exit(bool({'torch', 'numpy', 'amqtt', 'paho'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.fixture
def certificates(tmp_path) -> Path:
    """A CA, a server for 127.0.0.1, and clients named `orchestrator` and `a`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    ca = "-CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:FALSE"
    for name, subject, extra in (
        ("ca", "CA", ""),
        ("server", "server", f"{ca} -addext subjectAltName=IP:127.0.0.1"),
        ("orchestrator", "orchestrator", ca),
        ("a", "a", ca),
    ):
        command = f"openssl req -x509 {key} -keyout {name}.key -out {name}.pem -subj /CN={subject}"
        subprocess.run(
            [*command.split(), *extra.split()], cwd=tmp_path, check=True, capture_output=True
        )
    return tmp_path


@needs_mosquitto
def test_with_tls_the_certificate_is_the_identity(certificates, tmp_path, connect):
    """The files of hardware/broker, with other paths, another fleet and another port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = (PUBLISHED / "mosquitto.conf").read_text()
    for before, after in (
        ("listener 8883", f"listener {port} 127.0.0.1"),
        ("/etc/mosquitto/certs", str(certificates)),
        ("/etc/mosquitto", str(tmp_path)),
    ):
        assert before in config
        config = config.replace(before, after)
    (tmp_path / "mosquitto.conf").write_text(f"user root\n{config}")
    acl = (PUBLISHED / "stillhouse.acl").read_text().replace("/home/", f"/{FLEET}/")
    (tmp_path / "stillhouse.acl").write_text(acl)
    (tmp_path / "stillhouse.acl").chmod(0o600)
    url = f"mqtts://127.0.0.1:{port}"
    command = [str(broker.find()), "-c", str(tmp_path / "mosquitto.conf")]
    with subprocess.Popen(command) as process, contextlib.ExitStack() as ends:
        ends.callback(process.kill)
        until(lambda: listening(url), "Mosquitto")
        server = connect(url, "server", user="orchestrator", tls=certificates)
        device = connect(url, "device", user="a", tls=certificates)
        server.subscribe("#", "+")
        device.publish("b", "up", b"forged")
        device.publish("a", "up", b"true")
        assert server.get() == ("a/up", b"true")
