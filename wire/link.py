"""The connection to the broker: the one file that touches paho.

MQTT 3.1.1 only, so that any broker serves. A thread of its own keeps the connection: when it
breaks it is made again after a full-jitter back-off, uniform on (0, min(cap, base * 2^attempt)), so
that a fleet does not come back all at once. What happens is handed to `emit` in that thread;
callers put it in a queue.
"""

import random
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from wire.address import BrokerAddress
from wire.errors import LinkError, StorageError

KEEPALIVE_S = 30
BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 60.0
# Refusals that no waiting mends (MQTT 3.1.1, table 3.1): protocol, client id, credentials, rights.
_FINAL = {"Unsupported protocol version", "Client identifier not valid",
          "Bad user name or password", "Not authorized"}  # fmt: skip


class Arrived(NamedTuple):
    """A message came."""

    topic: str
    payload: bytes


class Connected(NamedTuple):
    """The broker is there (again), and subscriptions are made."""


class Lost(NamedTuple):
    """The connection broke, or an attempt to make one failed."""

    reason: str


LinkEvent = Arrived | Connected | Lost


class Link:
    """A connection that comes back by itself.

    Args:
        address: the broker.
        client_id: stable, so that the broker keeps the session where `persistent`.
        subscriptions: (topic filter, QoS), subscribed at each connection.
        emit: called with each event, in the connection's thread.
        will: called before each attempt; the (topic, payload) the broker publishes, retained,
            when the connection breaks.
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
    ) -> None:
        self.address = address
        self.bytes_in = 0
        self.bytes_out = 0
        self.refused: LinkError | None = None
        self._subscriptions = list(subscriptions)
        self._emit, self._will = emit, will
        self._closing = threading.Event()
        self._settled = threading.Event()  # connected once, or refused for good
        self._attempt = 0
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=not persistent,
            reconnect_on_failure=False,
        )
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_message = self._received
        client.on_socket_open = _without_delay
        # Without this callback paho writes to the socket in whatever thread publishes as well, and
        # a message that one thread has sent in part is torn by what the other sends.
        client.on_socket_register_write = _leave_to_loop
        client.max_queued_messages_set(0)
        if address.username:
            client.username_pw_set(address.username, address.password)
        if address.secure:
            client.tls_set(
                ca_certs=str(address.ca_file) if address.ca_file else None,
                certfile=str(address.cert_file) if address.cert_file else None,
                keyfile=str(address.key_file) if address.key_file else None,
                tls_version=ssl.PROTOCOL_TLS_CLIENT,
            )
        self._client = client
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    def start(self) -> None:
        """Begin to connect, in the background."""
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
        """Whether the connection stands now."""
        return self._client.is_connected()

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> None:
        """Publish. QoS 1 waits for a connection in memory; QoS 0 is dropped without one."""
        if qos == 0 and not self.connected:
            return
        self.bytes_out += len(payload)
        self._client.publish(topic, payload, qos=qos, retain=retain)

    def close(self, last: tuple[str, bytes] | None = None) -> None:
        """End the connection properly; `last` is published before, retained."""
        self._closing.set()
        if last and self.connected:
            self.bytes_out += len(last[1])
            self._client.publish(last[0], last[1], qos=1, retain=True).wait_for_publish(5.0)
        self._client.disconnect()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def _run(self) -> None:
        while not self._closing.is_set() and self.refused is None:
            try:
                if self._will:
                    topic, payload = self._will()
                    self._client.will_set(topic, payload, qos=1, retain=True)
                self._client.connect(self.address.host, self.address.port, KEEPALIVE_S)
                # Not loop_forever(): only loop() makes what lets publish() wake it from its wait.
                while self._client.loop() == paho.MQTT_ERR_SUCCESS:
                    pass
            except StorageError as fault:  # of `will`
                self._emit(Lost(str(fault)))
            except Exception as fault:  # noqa: BLE001 - the next attempt may do better
                self._emit(Lost(f"broker {self.address.url} cannot be reached: {fault}"))
            if self.refused is None:
                ceiling = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**self._attempt)
                self._attempt = min(self._attempt + 1, 10)
                self._closing.wait(random.uniform(0, ceiling))

    def _connected(
        self, _c: paho.Client, _u: object, _f: paho.ConnectFlags, code: ReasonCode,
        _p: Properties | None,
    ) -> None:  # fmt: skip
        if code.is_failure:
            if code.getName() in _FINAL:
                self.refused = LinkError(
                    f"broker {self.address.url} refuses this client: {code.getName()}; check "
                    "username, password and certificate against the enrolment"
                )
                self._settled.set()
            return
        self._attempt = 0
        if self._subscriptions:
            self._client.subscribe(self._subscriptions)
        self._settled.set()
        self._emit(Connected())

    def _disconnected(
        self, _c: paho.Client, _u: object, _f: paho.DisconnectFlags, code: ReasonCode,
        _p: Properties | None,
    ) -> None:  # fmt: skip
        if not self._closing.is_set():
            self._emit(Lost(f"connection to {self.address.url} lost: {code.getName()}"))

    def _received(self, _c: paho.Client, _u: object, message: paho.MQTTMessage) -> None:
        self.bytes_in += len(message.payload)
        self._emit(Arrived(message.topic, bytes(message.payload)))


def _without_delay(_c: paho.Client, _u: object, stream: Any) -> None:
    """Send small messages at once: a question for chunks must not wait for an acknowledgement."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _leave_to_loop(_c: paho.Client, _u: object, _s: object) -> None:
    """Nothing to do: paho wakes the connection's thread, which writes."""
