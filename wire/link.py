"""The connection to the broker: the one file that touches paho.

It speaks MQTT 3.1.1 only, so that any broker serves. A separate thread keeps the connection. When
the connection breaks, the thread connects again after a full-jitter back-off, uniform on
(0, min(cap, base * 2^attempt)), so that a fleet does not come back all at once. The back-off starts
over only after a connection has lasted for `STEADY_S`, longer than any back-off: two clients with
the same name, which take the connection from each other, slow each other down. The thread passes
events to `emit`; callers put them in a queue.
"""

import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, LogLevel
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from wire import tls
from wire.address import BrokerAddress
from wire.errors import RefusedError

KEEPALIVE_S = 30
BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 60.0
STEADY_S = 1.5 * BACKOFF_CAP_S
CUTS = 3  # connections in a row that the broker must end early before a cause is named
LARGE_BYTES = 4096  # some brokers refuse such messages; all our other messages are far smaller
AT_ONCE_S = 5.0  # a broker that refuses such a message ends the connection within this time
# Refusals that waiting does not mend (MQTT 3.1.1, table 3.1): protocol, client id, credentials,
# rights.
_FINAL = {"Unsupported protocol version", "Client identifier not valid",
          "Bad user name or password", "Not authorized"}  # fmt: skip
_ACCEPTED = "Success"
_CLOSED = "Unspecified error"  # paho's name for: the other side closed the connection


class Arrived(NamedTuple):
    """A message arrived."""

    topic: str
    payload: bytes


class Connected(NamedTuple):
    """The broker is there (again), and subscriptions are made."""


class Lost(NamedTuple):
    """The connection broke, or an attempt to make one failed."""

    reason: str


LinkEvent = Arrived | Connected | Lost


class Backoff:
    """How long to wait before the next attempt, and why connections end early.

    MQTT 3.1.1 gives no reason when a broker ends a connection. If a broker ends `CUTS` connections
    in a row, each soon after it had accepted us, there are two likely causes. If each one ended
    right after a large message, the message is too large for the broker. If none did, another
    client probably uses our name.

    Args:
        client_id: our name at the broker.
        rival: what a person should do if another client has that name.
    """

    def __init__(self, client_id: str, rival: str) -> None:
        self._client_id, self._rival = client_id, rival
        self._attempt = 0
        self._since_s: float | None = None  # when the connection was made
        self._large = (0.0, 0)  # when its first large message was sent; bytes of its largest
        self._cuts: list[int] = []  # for each early end: bytes of the large message before it, or 0

    def ceiling_s(self) -> float:
        """The longest wait before the next attempt; it doubles with each attempt."""
        ceiling = min(BACKOFF_CAP_S, BACKOFF_BASE_S * (1 << self._attempt))
        self._attempt = min(self._attempt + 1, 10)
        return ceiling

    def connected(self, now_s: float) -> None:
        """The broker accepted us."""
        self._since_s, self._large = now_s, (0.0, 0)

    def published(self, size: int, now_s: float) -> None:
        """A message of so many bytes was sent."""
        if size >= LARGE_BYTES:
            first_s, largest = self._large
            self._large = (first_s if largest else now_s, max(size, largest))

    def unreachable(self) -> None:
        """An attempt failed: the cause is the broker, which comes and goes."""
        self._since_s = None
        self._cuts.clear()

    def ended(self, now_s: float, *, by_broker: bool) -> str:
        """The likely cause of a connection's end; "" if none is known."""
        since_s, self._since_s = self._since_s, None
        if since_s is None:
            return ""
        steady = now_s - since_s >= STEADY_S
        if steady:
            self._attempt = 0
        if steady or not by_broker:
            self._cuts.clear()
            return ""
        first_s, largest = self._large
        self._cuts.append(largest if now_s - first_s <= AT_ONCE_S else 0)
        last = self._cuts[-CUTS:]
        if len(last) < CUTS:
            return ""
        if all(last):
            return (
                f"the broker ended {len(self._cuts)} connections in a row when it was sent a "
                f"message of about {min(last):,} bytes: it seems to take none so large. Set a "
                "smaller chunk_bytes, or raise the broker's limit (Mosquitto: max_packet_size)"
            )
        if not any(last):
            return (
                f"the broker ended {len(self._cuts)} connections in a row soon after it had "
                f"accepted them: most likely another client uses this name, {self._client_id}; "
                f"{self._rival}"
            )
        return ""


class Link:
    """A connection that comes back by itself.

    Args:
        address: the broker.
        client_id: our name at the broker.
        subscriptions: (topic filter, QoS) to subscribe to at each connection.
        emit: called with each event, in the connection's thread.
        will: called before each attempt; returns the (topic, payload) that the broker publishes,
            retained, when the connection breaks.
        persistent: the broker keeps the session of this client id between connections.
        rival: what a person should do if another client uses the client id.

    Attributes:
        bytes_in, bytes_out: of all messages so far.
        queued_bytes: of messages that wait here: not yet written (QoS 0) or acknowledged (QoS 1).

    Raises:
        LinkError: a certificate or key cannot be used.
    """

    def __init__(
        self,
        address: BrokerAddress,
        client_id: str,
        *,
        subscriptions: Sequence[tuple[str, int]],
        emit: Callable[[LinkEvent], None],
        will: Callable[[], tuple[str, bytes]] | None = None,
        persistent: bool = False,
        rival: str = "give each client a name of its own",
    ) -> None:
        self.address = address
        self.bytes_in = 0
        self.bytes_out = 0
        self.queued_bytes = 0
        self.refused: RefusedError | None = None
        self._subscriptions = list(subscriptions)
        self._emit, self._will = emit, will
        self._answer = ""  # the broker's answer to the current attempt
        self._alert = ""  # why TLS broke it
        self._queue_lock = threading.Lock()
        self._queue: dict[int, tuple[int, int]] = {}  # QoS and bytes of messages on their way
        self._early: set[int] = set()  # messages that were sent before `publish` returned
        self._closing = threading.Event()
        self._settled = threading.Event()  # connected once, or refused for good
        self._backoff = Backoff(client_id, rival)
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=not persistent,
            reconnect_on_failure=False,
        )
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_message = self._received
        client.on_publish = self._sent
        client.on_socket_open = _without_delay
        # Without this callback paho also writes to the socket in the thread that publishes, and
        # two threads may then mix the bytes of two messages.
        client.on_socket_register_write = _leave_to_loop
        client.max_queued_messages_set(0)
        if address.username:
            client.username_pw_set(address.username, address.password)
        self._tls = tls.context(address) if address.secure else None
        if self._tls:
            client.tls_set_context(self._tls)
            client.on_log = self._logged
        self._client = client
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Start to connect in the background."""
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the first connection.

        Raises:
            LinkError: the broker refuses us for good.
        """
        self._settled.wait(timeout_s)
        if self.refused:
            raise self.refused
        return self._settled.is_set()

    @property
    def connected(self) -> bool:
        """Whether there is a connection now."""
        return self._client.is_connected()

    def subscribe(self, subscriptions: Sequence[tuple[str, int]]) -> None:
        """Subscribe to more (topic filter, QoS), now and at each later connection."""
        self._subscriptions += subscriptions
        if self.connected:
            self._client.subscribe(list(subscriptions))

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish a message. Without a connection, QoS 1 waits in memory and QoS 0 is dropped."""
        if qos == 0 and not self.connected:
            return
        self.bytes_out += len(payload)
        self._backoff.published(len(payload), time.monotonic())
        sent = self._client.publish(topic, payload, qos=qos, retain=retain)
        if qos == 0 and sent.rc != paho.MQTT_ERR_SUCCESS:  # dropped: the connection just broke
            return
        with self._queue_lock:
            if sent.mid in self._early:
                self._early.remove(sent.mid)
            else:
                self.queued_bytes += len(payload) - self._queue.get(sent.mid, (0, 0))[1]
                self._queue[sent.mid] = qos, len(payload)

    def _sent(self, _c: paho.Client, _u: object, mid: int, _r: ReasonCode, _p: Properties) -> None:
        with self._queue_lock:
            if mid in self._queue:
                self.queued_bytes -= self._queue.pop(mid)[1]
            else:
                self._early.add(mid)

    def close(self, last: tuple[str, bytes] | None = None) -> None:
        """End the connection in good order; publish `last` before that, retained."""
        self._closing.set()
        if last and self.connected:
            self.bytes_out += len(last[1])
            sent = self._client.publish(last[0], last[1], qos=1, retain=True)
            if sent.rc == paho.MQTT_ERR_SUCCESS:  # not if the connection broke just now
                sent.wait_for_publish(5.0)
        self._client.disconnect()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def _run(self) -> None:
        while not self._closing.is_set() and self.refused is None:
            try:
                self._alert = ""
                if self._tls:  # the certificate may have been renewed
                    tls.load(self._tls, self.address)
                if self._will:
                    topic, payload = self._will()
                    self._client.will_set(topic, payload, qos=1, retain=True)
                self._client.connect(self.address.host, self.address.port, KEEPALIVE_S)
                # Not loop_forever(): only loop() makes the socket by which publish() wakes it.
                while self._client.loop() == paho.MQTT_ERR_SUCCESS:
                    pass
            except Exception as fault:  # noqa: BLE001 - the next attempt may do better
                self._backoff.unreachable()
                why = tls.reason(fault, secure=self.address.secure)
                self._emit(Lost(f"broker {self.address.url} cannot be reached: {why}"))
            if self.refused is None:
                self._closing.wait(random.uniform(0, self._backoff.ceiling_s()))

    def _connected(
        self, _c: paho.Client, _u: object, _f: paho.ConnectFlags, code: ReasonCode,
        _p: Properties | None,
    ) -> None:  # fmt: skip
        self._answer = code.getName()
        if code.is_failure:
            if code.getName() in _FINAL:
                self.refused = RefusedError(
                    f"broker {self.address.url} refuses this client: {code.getName()}; check "
                    "username, password and certificate against the enrolment"
                )
                self._settled.set()
            return
        self._backoff.connected(time.monotonic())
        if self._subscriptions:
            self._client.subscribe(self._subscriptions)
        self._settled.set()
        self._emit(Connected())

    def _disconnected(
        self, _c: paho.Client, _u: object, _f: paho.DisconnectFlags, code: ReasonCode,
        _p: Properties | None,
    ) -> None:  # fmt: skip
        with self._queue_lock:  # paho drops those of QoS 0
            self._queue = {mid: each for mid, each in self._queue.items() if each[0]}
            self.queued_bytes = sum(size for _, size in self._queue.values())
            self._early.clear()
        if self._closing.is_set() or self.refused:
            return
        answer, self._answer = self._answer, ""
        by_broker = code.getName() == _CLOSED
        cause = self._backoff.ended(time.monotonic(), by_broker=by_broker)
        what = "the broker ended it" if by_broker else code.getName()
        if self._alert:
            what = self._alert
        elif not answer and by_broker:
            tls = "does not speak TLS" if self.address.secure else "speaks TLS (write mqtts)"
            what = f"it was ended without an answer; is it the broker's port, or one that {tls}?"
        elif answer != _ACCEPTED:
            what = answer
        self._emit(Lost(f"connection to {self.address.url} lost: {cause or what}"))

    def _logged(self, _c: paho.Client, _u: object, level: int, text: str) -> None:
        """Note why the broker broke TLS off, which paho only logs."""
        if level == LogLevel.MQTT_LOG_ERR:
            self._alert = tls.alert(text) or self._alert

    def _received(self, _c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
        self.bytes_in += len(message.payload)
        self._emit(Arrived(message.topic, bytes(message.payload)))


def _without_delay(_c: paho.Client, _u: object, stream: Any) -> None:
    """Send small messages at once: a question for chunks must not wait for an acknowledgement."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_to_loop(_c: paho.Client, _u: object, _s: object) -> None:
    """Do nothing: paho wakes the connection's thread, and that writes."""
