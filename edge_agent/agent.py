"""The agent's loop: takes events, applies the rules, and does the resulting actions.

One thread owns all state; the network thread and the worker thread only put events in its queue.
The package's docstring has the modules that an order passes, and what survives a power cut.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from edge_agent import rounds
from edge_agent.folder import Folder
from edge_agent.joining import Identity
from edge_agent.notify import Notifier
from edge_agent.presence import Presence
from edge_agent.rounds import Accept, Action, Fetch, Offer, Phase, Settle, Work
from edge_agent.supply import Supply
from edge_agent.update.staging import Updates
from edge_agent.worker import Advanced, Ended, Worker
from ondevice import images, meter
from ondevice.config import AgentConfig
from ondevice.outcome import Outcome
from ondevice.work import CancelledError
from wire import __version__, messages, storage, topics
from wire.errors import OrderError, StalledError, StillhouseError, StorageError, WireError
from wire.link import Arrived, Connected, Link, LinkEvent, Lost
from wire.messages import Chunk, Gone, Order, Receipt, Result, Want
from wire.sealing import Opener
from wire.storage import Patience

log = logging.getLogger("edge-agent")

TICK_S = 0.5
STOP_S = 5.0  # time for a training step to end
MAX_FAULT = 2000  # characters of a fault that are sent; a fault may quote an order at length


Event = LinkEvent | Advanced | Ended


class Agent:
    """One device.

    Raises:
        DataError: the images cannot be used.
        SettingsError, StorageError: see `Folder`.
    """

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._worker = Worker(self._events.put, config.threads)
        self._patience = Patience(self._say_disk, self._worker.pause)
        self._folder = Folder(config.state, config.chunk_bytes, self._patience)
        self.blobs, self.journal = self._folder.blobs, self._folder.journal
        self._systemd = Notifier()
        try:
            with self._systemd.busy():
                self.images = images.load(
                    config.data, input_shape=config.image, bad_share=config.bad_share
                )
            self.images.tell(log)
            self._identity = Identity(config) if config.kit.claim else None
            newest = self.journal.sealed(config.kit.signer)
        except BaseException:
            self._folder.close()
            raise
        self._opener = Opener(config.kit.signer, newest)
        self._updates = Updates(config)
        self._state = rounds.RoundState()
        self._supply: Supply | None = None
        self._put_off: list[Event] = []  # events for which the disk has no room yet
        self._again_s = 0.0  # when they are handled again, and chunks are requested again
        self._stopping = threading.Event()
        self._reported = 0.0
        self._presence = Presence(config.device, self._folder, self.images, self._updates)
        self._refused = ""  # why the orchestrator refuses this device, "" if it does not
        self.link = Link(
            config.broker,
            config.client_id,
            subscriptions=[
                (self._topic("order"), 1),
                (self._topic("down"), 0),
                (topics.topic(config.fleet, topics.ALL, "hello"), 1),
            ],
            emit=self._events.put,
            will=lambda: self._death(self._presence.begin_session()),
            persistent=True,
            rival=f"is another agent at work as {config.device!r}? Each needs a name of its own",
        )

    def run(self) -> None:
        """Work until `stop`.

        Raises:
            LinkError: the broker permanently refuses this device.
            StorageError: the state folder cannot be written, or is gone.
        """
        if latest := self.journal.latest():
            order, result, receipted = latest
            self._apply(rounds.restored(order, result, receipted=receipted))
        self._systemd.ready(f"{len(self.images.y)} images; looking for {self.config.broker.url}")
        self.link.start()
        try:
            while not self._stopping.is_set() and self.link.refused is None:
                with contextlib.suppress(queue.Empty):
                    self._take(self._events.get(timeout=TICK_S))
                self._tick()
                self._systemd.alive()
        except FileNotFoundError as fault:
            if self._folder.here:
                raise
            raise storage.gone(self.config.state) from fault
        finally:
            self._systemd.stopping()
            self._worker.end(STOP_S)
            self.link.close(self._death(self._presence.death()))
            self._folder.close()
        if self.link.refused:
            raise self.link.refused

    def stop(self) -> None:
        """End `run` soon; open work continues after the next start."""
        self._stopping.set()

    def _take(self, event: Event) -> None:
        """Handle an event; if the disk has no room for it, handle it again later."""
        before = self._state
        try:
            self._handle(event)
        except StalledError as fault:
            self._state = before
            # An order or receipt that is sent again while the disk is full is the same event.
            if not (isinstance(event, Arrived) and event in self._put_off):
                self._put_off.append(event)
            self._stalled(fault, "events")

    def _stalled(self, fault: StalledError, what: str) -> None:
        self._again_s = time.monotonic() + storage.RETRY_S
        self._patience.met(fault, what)

    def _say_disk(self, text: str) -> None:
        self._systemd.status(text or f"connected to {self.config.broker.url}")

    def _handle(self, event: Event) -> None:
        match event:
            case Arrived(topic, payload):
                try:
                    message, body = messages.decode(self._open(topic, payload), sender=topic)
                except OrderError as fault:
                    # Work on an earlier order continues, because its round may still be open.
                    reason = f"agent {__version__} cannot follow it: {fault}"
                    log.error("order refused: %s", reason)  # noqa: TRY400
                    self._publish("result", self._result(fault, reason))
                    return
                except WireError as fault:
                    log.warning("message dropped: %s", fault)
                    return
                self._received(message, body)
            case Connected():
                log.info("connected to %s as %s", self.config.broker.url, self.config.device)
                self._systemd.status(f"connected to {self.config.broker.url}")
                self._be_born()
            case Lost(reason):
                log.warning("%s; trying again", reason)
                self._updates.pause()
                self._systemd.status(f"{reason}; trying again")
            case Advanced(phase, done, total):
                self._report(phase, done, total)
            case Ended(order, outcome):
                self._ended(order, outcome)

    def _open(self, topic: str, payload: bytes) -> bytes:
        """The frame of a message; see `wire.sealing`."""
        before = self._opener.newest
        frame = self._opener.open(topic, payload)
        if self._opener.newest > before:
            try:
                self.journal.sealed(self.config.kit.signer, self._opener.newest)
            except StorageError:  # the order is taken again when there is room
                self._opener.newest = before
                raise
        return frame

    def _received(self, message: messages.Message, body: memoryview) -> None:
        now = time.monotonic()
        match message:
            case Order():
                self._refused = ""
                self._apply(rounds.ordered(self._state, message, now, self.config.resend_s))
            case Receipt(subject="birth"):
                self._turned_away(message.reason)
            case Receipt(subject="result"):  # "measured" is for `edge-agent measure --submit`
                self._apply(rounds.received(self._state, message))
            case messages.Hello():
                self._be_born()
            case messages.Renew() if self._identity:
                self._publish("sign", self._identity.request())
            case messages.Certificate() if self._identity:
                self._renewed(self._identity, message)
            case Want():
                self.blobs.answer(message, self._send_up)
            case messages.Update():
                self._updates.told(message)
            case Chunk() | Gone():
                if not self._updates.take(message, body) and self._supply:
                    self._supplied(lambda supply: supply.take(message, body))
            case _:
                pass

    def _renewed(self, identity: Identity, message: messages.Certificate) -> None:
        if message.reason:
            log.error("the orchestrator does not renew this device's certificate: %s",
                      message.reason)  # fmt: skip
        elif identity.take(message.pem):
            log.info("this device has a new certificate")

    def _turned_away(self, reason: str) -> None:
        """Report the refusal once, although every birth is answered with it."""
        if reason != self._refused:
            self._refused = reason
            log.error("the orchestrator refuses this device: %s", reason)
            self._systemd.status(f"refused: {reason}")

    def _tick(self) -> None:
        if not self._folder.here:  # SQLite would keep writing to the deleted file
            raise storage.gone(self.config.state)
        now = time.monotonic()
        self._updates.turns(now)
        if self._put_off and now >= self._again_s:
            events, self._put_off = self._put_off, []
            for event in events:
                self._take(event)
            if not self._put_off:
                self._patience.over("events")
        if self._supply and self.link.connected and now >= self._again_s:
            self._supplied(lambda supply: self._pull(supply, now))
        if self.link.connected:
            self._updates.lives(now)
            if self._state.phase is Phase.IDLE:
                for want in self._updates.wants(now):
                    self._send_up(want, b"")
            if self._updates.news():
                self._be_born()
            self._apply(rounds.ticked(self._state, now, self.config.resend_s))

    def _pull(self, supply: Supply, now: float) -> None:
        if supply.advance():
            self._apply(rounds.fetched(self._state))
            return
        for want in supply.wants(now):
            self._send_up(want, b"")
        self._report("fetch", *supply.progress)

    def _supplied(self, work: Callable[[Supply], None]) -> None:
        """Do some work on the order's supply; it is requested again later if the disk is full."""
        supply, before = self._supply, self._state
        if supply is None:
            return
        try:
            work(supply)
        except StalledError as fault:
            self._state = before
            self._stalled(fault, "supply")
        except (StillhouseError, OSError) as fault:
            self._patience.over("supply")
            self._take(Ended(supply.order, StillhouseError(str(fault))))
        else:
            self._patience.over("supply")

    def _apply(self, transition: rounds.Transition) -> None:
        self._state, actions = transition
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Accept(order):
                self.journal.accept(order)
                self._worker.cancel()
                log.info("round %d: order %d of %s", order.round, order.sequence, order.run)
            case Fetch(order):
                try:
                    self._supply = Supply(order, self.blobs, self._folder.shelf, self.config)
                except (StillhouseError, OSError) as fault:
                    self._take(Ended(order, StillhouseError(str(fault))))
            case Work(order):
                self._work(order)
            case Offer(result):
                self._publish("result", result)
            case Settle(receipt):
                self._settle(receipt)

    def _work(self, order: Order) -> None:
        assert self._supply is not None  # noqa: S101 - Work follows a complete Supply
        kept_file = self._folder.kept.of(order)
        supply, self._supply = self._supply, None
        self._worker.start(
            order, supply, kept_file, images=self.images, blobs=self.blobs, patience=self._patience
        )

    def _ended(self, order: Order, outcome: Outcome | StillhouseError) -> None:
        if self._state.order != order or isinstance(outcome, CancelledError):
            return  # a newer order has replaced it, even if it has come again since
        if isinstance(outcome, StillhouseError):
            self._finish(order, None, fault=str(outcome))
            log.error("round %d: %s", order.round, outcome)
            self._supply = None
            return
        weights_file = self._folder.kept.put(order, outcome.kept_state)
        log.info("round %d: done", order.round)
        self._finish(order, weights_file, blobs=outcome.blobs, metrics=outcome.metrics)
        self._tidy(outcome.blobs.values())

    def _finish(
        self, order: Order, weights_file: str | None, fault: str = "", **outcome: Any
    ) -> None:
        """Journal the result, then offer it."""
        result = self._result(order, fault, submodel=order.submodel, **outcome)
        self.journal.finish(order, result, weights_file)
        self._apply(rounds.worked(self._state, result, time.monotonic(), self.config.resend_s))

    def _result(self, order: Order | OrderError, fault: str = "", **outcome: Any) -> Result:
        return Result(
            device=self.config.device,
            run=order.run,
            sequence=order.sequence,
            round=order.round,
            samples=len(self.images.y),
            data_digest=self.images.digest,
            fault=fault[:MAX_FAULT],
            **outcome,
        )

    def _settle(self, receipt: Receipt) -> None:
        self.journal.receipted(receipt.run, receipt.sequence)
        self._tidy(())
        if receipt.accepted:
            log.info("result %d of %s is accepted", receipt.sequence, receipt.run)
        else:
            log.error("result %d of %s is refused: %s", receipt.sequence, receipt.run,
                      receipt.reason)  # fmt: skip
        self._report("idle", 0, 0)
        meter.give_back()

    def _tidy(self, keep: Iterable[messages.BlobRef]) -> None:
        """Remove the blobs that are not in `keep`, and weights that the journal does not name."""
        self.blobs.keep_only({ref.digest for ref in keep})
        self._folder.kept.tidy()

    def _be_born(self) -> None:
        self._publish("birth", self._presence.birth(), retain=True)
        if self._supply:
            self._supply.reconnected()
        if self._state.phase is Phase.OFFERING:
            self._state = replace(self._state, offer_at_s=0.0)

    def _death(self, death: messages.Death) -> tuple[str, bytes]:
        return self._topic("death"), messages.encode(death)

    def _report(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._reported < self.config.telemetry_s and phase != "idle":
            return
        self._reported = now
        if order := self._state.order:
            report = messages.Telemetry(
                device=self.config.device,
                run=order.run,
                round=order.round,
                phase=phase,  # type: ignore[arg-type]  # the worker names phases of the protocol
                done=done,
                total=total,
                memory_bytes=meter.resident_bytes(),
            )
            self._publish("telemetry", report, qos=0)

    def _send_up(self, message: Want | Chunk | Gone, body: bytes) -> None:
        self.link.publish(self._topic("up"), messages.encode(message, body), qos=0)

    def _publish(
        self, channel: str, message: messages.Message, *, qos: int = 1, retain: bool = False
    ) -> None:
        self.link.publish(self._topic(channel), messages.encode(message), qos=qos, retain=retain)

    def _topic(self, channel: str) -> str:
        return topics.topic(self.config.fleet, self.config.device, channel)
