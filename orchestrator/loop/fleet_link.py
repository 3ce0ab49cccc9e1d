"""The run's link to its fleet: decodes messages that arrive, encodes messages that go out.

Until the fleet is ours (`orchestrator.fleet.claim`), it neither hears devices nor tells them
anything.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet.claim import Claim, Say
from orchestrator.rules.budgets import Budgets
from wire import frames, messages, sealing, topics
from wire.address import BrokerAddress, client_id
from wire.blobs import BlobStore
from wire.errors import WireError
from wire.link import Arrived, Connected, Link, LinkEvent, Lost
from wire.messages import Message, Want
from wire.sealing import Sealer

log = logging.getLogger("orchestrator")

CONNECT_S = 30.0
QUEUED_BYTES = 64 << 20  # chunks for devices that the broker has not taken yet
COUNTED = 10_000  # devices whose bytes are counted: strangers can invent any number of names
_QOS = {"up": 0, "down": 0}  # chunks, which are asked for again if lost; all else is 1


class Heard(NamedTuple):
    """A device's message; its name comes from the topic, which the broker's access list guards."""

    device: str
    message: Message
    body: memoryview


class FleetLink:
    """One run's connection to the broker, and through it to the devices of its fleet.

    Args:
        config: of the run.
        run: its id.
        address: the broker.
        report: counts the bytes of the first `COUNTED` devices.
        emit: is called in the network thread with each event; the caller passes it to `read`.
        sealer: signs orders and receipts; None: they are not signed.
    """

    def __init__(
        self,
        config: RunConfig,
        run: str,
        address: BrokerAddress,
        *,
        report: Report,
        emit: Callable[[LinkEvent], None],
        sealer: Sealer | None = None,
    ) -> None:
        self._fleet, self._url, self._report = config.fleet, address.url, report
        self._claim = Claim(config.fleet, run, boot=str(time.time_ns()))
        self._budgets, self._sealer = Budgets(), sealer
        self._waiting: dict[str, tuple[Want, BlobStore]] = {}  # by device, the longest first
        self._hearing = False  # whether we are subscribed to devices
        self._counted: set[str] = set()  # devices
        self._awaited_s: float | None = None  # when we began to wait for the broker
        self._link = Link(
            address,
            client_id(config.fleet, f"orchestrator-{run.rpartition('.')[2]}", address.tag),
            subscriptions=[(self._claim.topic, 1)],
            emit=emit,
            will=lambda: (self._claim.topic, b""),
            rival=f"is a copy of the run {config.name!r} at work on another machine?",
        )

    def start(self) -> None:
        """Begin to connect."""
        self._awaited_s = time.monotonic()
        self._link.start()

    def close(self) -> None:
        """End the connection, and give up the claim on the fleet."""
        self._link.close((self._claim.topic, b"") if self._claim.held else None)

    def read(self, event: LinkEvent) -> Heard | None:
        """A device's message; None for any other event, and for a message that cannot be read.

        Raises:
            RunError: another run has the fleet.
        """
        match event:
            case Arrived(self._claim.topic, payload):
                self._say(self._claim.arrived(payload))
            case Arrived(topic, payload) if payload:  # empty: a message that we removed
                try:
                    device = topics.parse(topic).device
                    if not self._within_budget(device, frames.kind_of(payload)):
                        return None
                    message, body = messages.decode(payload, sender=topic)
                except WireError as fault:
                    log.warning("message dropped: %s", fault)
                    return None
                if self._counts(device):
                    self._report.received(device, len(payload))
                return Heard(device, message, body)
            case Connected():
                log.info("connected to %s", self._url)
                self._say(self._claim.connected(time.monotonic()))
            case Lost(reason):
                log.warning("%s; trying again", reason)
        return None

    def ticked(self, now_s: float) -> bool:
        """Note that time passed; returns whether the fleet is ours.

        Raises:
            LinkError: the broker refuses us, and trying again is useless.
        """
        if self._link.refused:
            raise self._link.refused
        if self._link.connected:
            self._awaited_s = None
        elif self._awaited_s is not None and now_s - self._awaited_s > CONNECT_S:
            log.warning("%s is not there yet; still trying", self._url)
            self._awaited_s = None  # said once
        if not self._claim.held:
            self._say(self._claim.ticked(now_s))
        self._serve()
        return self._claim.held

    def answer(self, device: str, want: Want, blobs: BlobStore) -> None:
        """Send a device the chunks that it asks for, once the broker has taken enough of others.

        Of a device that waits only the last question counts. One that asks for more than its budget
        gets no answer, and asks again.
        """
        self._waiting[device] = want, blobs
        self._serve()

    def _serve(self) -> None:
        """Answer devices that wait, the longest first, while the queue to the broker is short."""
        while self._waiting and self._link.queued_bytes < QUEUED_BYTES:
            device, (want, blobs) = next(iter(self._waiting.items()))
            del self._waiting[device]
            now_s, size = time.monotonic(), len(want.chunks) * want.chunk_bytes
            if self._budgets.download(device, size, now_s):
                send = partial(self.send, device, "down")
                blobs.answer(want, send)
            else:
                self._tell(device, now_s)

    def _within_budget(self, device: str, kind: frames.Kind | None) -> bool:
        now_s = time.monotonic()
        fits = self._budgets.reads(device, kind, now_s)
        if not fits and kind is not frames.Kind.CHUNK:  # a late chunk is no fault
            self._tell(device, now_s)
        return fits

    def _tell(self, device: str, now_s: float) -> None:
        if self._budgets.tells(device, now_s):
            log.warning("%s sends or asks for too much: what goes beyond is dropped", device)

    def send(self, device: str, channel: str, message: Message, body: bytes = b"") -> None:
        """Send a device a message."""
        if isinstance(message, Want):
            self._budgets.asked(device, len(message.chunks), time.monotonic())
        topic, payload = self._topic(device, channel), messages.encode(message, body)
        if self._sealer and frames.kind_of(payload) in sealing.KINDS:
            payload = self._sealer.seal(topic, payload)
        if self._counts(device):
            self._report.sent(device, len(payload))
        self._link.publish(topic, payload, qos=_QOS.get(channel, 1))

    def take_away(self, device: str, channel: str) -> None:
        """Remove a device's retained message from the broker."""
        self._link.publish(self._topic(device, channel), b"", retain=True)

    def _counts(self, device: str) -> bool:
        """Whether a device's bytes are counted."""
        if len(self._counted) < COUNTED:
            self._counted.add(device)
        return device in self._counted

    def _say(self, all_: tuple[Say, ...]) -> None:
        """Send messages to other runs and to all devices."""
        if self._claim.held and not self._hearing:
            # Not before: the broker sends its retained messages once, when we subscribe.
            self._hearing = True
            channels = topics.FROM_DEVICE
            self._link.subscribe([(self._topic("+", name), _QOS.get(name, 1)) for name in channels])
        for channel, hello, retain in all_:
            self._link.publish(self._topic(topics.ALL, channel), messages.encode(hello),
                               retain=retain)  # fmt: skip

    def _topic(self, device: str, channel: str) -> str:
        return topics.topic(self._fleet, device, channel)
