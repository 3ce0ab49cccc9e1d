"""The run's loop: events in, rules applied, actions done.

One thread owns all state. The network thread puts messages in its queue; a worker thread does the
heavy part (looking payloads over, aggregation) and puts its outcome there too.
"""

import contextlib
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from orchestrator.config import RunConfig
from orchestrator.display.report import Report, said
from orchestrator.fleet.claim import Claim, Say
from orchestrator.fleet.roster import MAX_REASON, Roster
from orchestrator.fleet.updates import Rollout
from orchestrator.loop.intake import Intake
from orchestrator.loop.worker import Admitted, Aggregated, Failed, Outcome, Worker
from orchestrator.rules import admit, rounds
from orchestrator.rules.rounds import Action, Close, Finish, GiveUp, Open, Phase, Remind, Session
from orchestrator.run_folder.store import Attempt, Store, Verdict, referred
from orchestrator.strategies.strategy import Metrics, State, Strategy
from wire import messages, stopping, topics
from wire.address import BrokerAddress
from wire.errors import (
    AdmissionError,
    RunError,
    StalledError,
    StillhouseError,
    StorageError,
    WireError,
)
from wire.link import Arrived, Connected, Link, LinkEvent, Lost
from wire.messages import (
    Birth,
    Chunk,
    Death,
    Gone,
    Measured,
    Message,
    Order,
    Receipt,
    Result,
    Telemetry,
    Want,
)  # fmt: skip
from wire.stopping import Interrupted

log = logging.getLogger("orchestrator")

TICK_S = 0.25
CONNECT_S = 30.0
STALLED_S = 60.0  # devices offer a result again within half of it


class Stop(NamedTuple):
    """A person or the system asks us to end."""


Event = LinkEvent | Outcome | Stop


class Coordinator:
    """One run over one broker.

    Args:
        config: of the run.
        store: its folder.
        strategy: the algorithm.
        enrolled: names that may take part; None takes any.
        address: the broker.
        report: is told what happens.
        rollout: packages that devices are told of.
        again: the command that goes on with the run; None: this process's.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        strategy: Strategy,
        *,
        enrolled: frozenset[str] | None,
        address: BrokerAddress,
        report: Report,
        rollout: Rollout,
        again: str | None = None,
    ) -> None:
        self.config, self.store, self.strategy = config, store, strategy
        self.report = report
        self._roster = Roster(
            config, enrolled, rollout, lambda device, order: self._send(device, "order", order)
        )
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._worker = Worker(strategy, store.patience, self._events.put)
        self._intake = Intake(store.blobs, config.transfer_chunks, config.retry_s)
        self._checking: set[str] = set()
        self._began = time.monotonic()
        self._late: frozenset[str] = frozenset()
        self._state = store.checkpoint() or strategy.begin()
        last = store.last_attempt()
        self._attempt = None if last is None or last.closed else last
        self._carried: dict[str, Order] = {}
        self._rounds = self._restored(last)
        self._address, self._again = address, again
        self._claim = Claim(config.fleet, store.run_id, boot=str(time.time_ns()))
        self._hearing = False  # devices
        self._stopped = False
        self._stalled_s = -math.inf  # when the disk was last found full
        self._ticked_s = time.monotonic()
        self.link = Link(
            address,
            f"stillhouse-{config.fleet}-orchestrator-{store.run_id.rpartition('.')[2]}",
            subscriptions=[(self._claim.topic, 1)],
            emit=self._events.put,
            will=lambda: (self._claim.topic, b""),
            rival=f"is a copy of the run {config.name!r} at work on another machine?",
        )

    def run(self, changed: Callable[[], None] = lambda: None) -> None:
        """Run until all rounds are done; `changed` is called after each event.

        Raises:
            LinkError: the broker refuses us for good.
            RunError: another run has the fleet, or every device failed, `rounds.ATTEMPTS` times in
                a row.
            StillhouseError: the strategy failed.
            Interrupted: `stop` was called.
        """
        if self.finished():
            return
        began, connected = time.monotonic(), False
        with stopping.instead(self._farewell, self.stop):
            self.link.start()
            try:
                if self._rounds.phase is Phase.COLLECTING:
                    self._apply(rounds.ticked(self._rounds, self.config.cohort, time.monotonic()))
                while not self.finished():
                    if self._stopped and self._rounds.phase is not Phase.AGGREGATING:
                        raise Interrupted
                    with contextlib.suppress(queue.Empty):
                        self._handle(self._events.get(timeout=TICK_S))
                    if self.link.refused:
                        raise self.link.refused
                    connected = connected or self.link.connected
                    if not connected and time.monotonic() - began > CONNECT_S:
                        log.warning("%s is not there yet; still trying", self._address.url)
                        connected = True  # said once
                    if self._claim.held:
                        self._tick()
                    else:
                        self._say(self._claim.ticked(time.monotonic()))
                    changed()
            except StalledError as fault:
                if self._stopped:  # while it was waited for
                    raise Interrupted from fault
                raise
            finally:
                self.link.close((self._claim.topic, b"") if self._claim.held else None)
                self._worker.end(wait=not self._stopped)

    def stop(self) -> None:
        """End `run` soon, and with `Interrupted`; an aggregation under way is finished and kept."""
        self._stopped = True
        self._events.put(Stop())

    def _farewell(self) -> str:
        """The answer to Ctrl-C."""
        state, attempt = self._rounds, self._attempt
        done = len(attempt.verdicts) if attempt else 0
        more = f"{done} results of round {state.round}" if done else "no result of the next"
        if self.store.patience.waiting:
            more += "; what the disk had no room for is done again"
        elif state.phase is Phase.AGGREGATING:
            more += ", which is aggregated first. Ended before that, it is aggregated again"
        return said(self.report, more, self._again)

    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._rounds.phase is Phase.FINISHED

    def _handle(self, event: Event) -> None:
        match event:
            case Arrived(topic, payload):
                self._arrived(topic, payload)
            case Connected():
                log.info("connected to %s", self._address.url)
                self._say(self._claim.connected(time.monotonic()))
            case Lost(reason):
                log.warning("%s; trying again", reason)
            case Admitted(result, fault):
                self._checking.discard(result.device)
                self._decide(result, fault)
            case Aggregated(state, metrics):
                self._close(state, metrics)
            case Failed(fault):
                if self._stopped:
                    raise Interrupted from fault
                raise fault
            case Stop():
                pass

    def _arrived(self, topic: str, payload: bytes) -> None:
        if topic == self._claim.topic:
            self._say(self._claim.arrived(payload))
            return
        if not payload:  # a retained message was taken from the broker, by us
            return
        try:
            address = topics.parse(topic)
            message, body = messages.decode(payload, sender=topic)
        except WireError as fault:
            log.warning("message dropped: %s", fault)
            return
        self.report.received(address.device, len(payload))
        self._received(address.device, message, body)

    def _say(self, all_: tuple[Say, ...]) -> None:
        if self._claim.held and not self._hearing:
            # Only now: what the broker keeps of devices comes once, to whom the fleet is.
            self._hearing = True
            qos = {"up": 0}
            self.link.subscribe([
                (topics.topic(self.config.fleet, "+", channel), qos.get(channel, 1))
                for channel in topics.FROM_DEVICE
            ])  # fmt: skip
        for channel, hello, retain in all_:
            topic = topics.topic(self.config.fleet, topics.ALL, channel)
            self.link.publish(topic, messages.encode(hello), retain=retain)

    def _received(self, device: str, message: Message, body: memoryview) -> None:
        now = time.monotonic()
        match message:
            case Birth():
                before = self._roster.births.get(device)
                if birth := self._roster.born(device, message, now):
                    self.report.born(device, birth)
                    if before and before.state_id != birth.state_id:
                        self._intake.drop(device)  # what it offered is gone
                    self._intake.resume(device)
                    session = Session(birth.session, birth.state_id)
                    self._apply(rounds.born(self._rounds, self.config.cohort, device, session, now))
                elif message.device == device:
                    self._turn_away(device)
            case Death(session=number, state_id=state_id):
                self._roster.died(device, number, state_id)
                self._apply(rounds.died(self._rounds, device, Session(number, state_id)))
            case Telemetry():
                if message.run == self.store.run_id and device in self._roster.births:
                    self.report.telemetry(device, message)
            case Result():
                self._result(device, message)
            case Measured():
                self._roster.measured(device, message, bytes(body), now)
                topic = topics.topic(self.config.fleet, device, "telemetry")
                self.link.publish(topic, b"", retain=True)  # taken from the broker
            case Want():
                self.store.blobs.answer(message, lambda m, b: self._send(device, "down", m, b))
            case Chunk() | Gone():
                with self._giving_up(device):
                    self._intake.take(device, message, body)
                    self.store.patience.over("intake")
            case _:
                pass

    def _turn_away(self, device: str) -> None:
        """A device whose birth is refused gets no order, and the one that it has counts no more."""
        self.report.turned_away(device, self._roster.refused[device])
        if session := self._rounds.live.get(device):
            self._apply(rounds.died(self._rounds, device, session))
        with self._giving_up(device):
            raise AdmissionError(self._roster.refused[device])

    def _result(self, device: str, result: Result) -> None:
        ours = result.run == self.store.run_id
        if ours and (known := self.store.verdict(result.sequence, device)):
            self._receipt(known, result)
            return
        if device not in self._roster.births:
            return  # not enrolled, or its birth is still on the way: it will offer again
        attempt = self._attempt
        order = (attempt.orders if attempt else self._carried).get(device)
        collecting = self._rounds.phase is Phase.COLLECTING
        try:
            samples = self._roster.births[device].samples
            open_order = order if collecting else None
            admit.header(result, open_order, device, samples, self.strategy.task.limits)
        except StillhouseError as fault:
            answers = order and (result.run, result.sequence) == (order.run, order.sequence)
            if answers and result.device == device:
                self._decide(result, fault)
            else:  # of a round that is closed, not ours, in another's name: nothing to note
                log.warning("%s: result refused: %s", device, fault)
                reason = str(fault)[:MAX_REASON]
                self._receipt(Verdict(device, accepted=False, reason=reason, result=result), result)
            return
        if device not in self._checking:
            with self._giving_up(device):
                self._intake.begin(result)

    def _tick(self) -> None:
        now = time.monotonic()
        if now - self._stalled_s < STALLED_S:  # devices offer again: the round waits for them
            late_s = self._rounds.deadline_s + now - self._ticked_s
            self._rounds = replace(self._rounds, deadline_s=late_s)
        self._ticked_s = now
        for result in self._intake.complete():
            self._checking.add(result.device)
            assert self._attempt is not None  # noqa: S101 - results are pulled in open rounds
            order = self._attempt.orders[result.device]
            self._worker.look_over(self._state, order, result)
        with self._stalling():
            for device, want in self._intake.wants(now, frozenset(self._rounds.live)):
                self._send(device, "down", want)
        self._roster.ticked(now)
        self._apply(rounds.ticked(self._rounds, self.config.cohort, now))

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        """What a full disk does not take is left: it is asked for, or offered, again."""
        try:
            yield
        except StalledError as fault:
            self._stalled_s = time.monotonic()
            self.store.patience.met(fault, "intake")

    @contextlib.contextmanager
    def _giving_up(self, device: str) -> Iterator[None]:
        """If a device's blobs cannot be had, its result is refused and the round goes on."""
        try:
            with self._stalling():
                yield
        except StorageError:
            raise
        except (StillhouseError, OSError) as fault:
            self._intake.drop(device)
            attempt = self._attempt
            if attempt and device in attempt.orders:
                order = attempt.orders[device]
                result = Result(device, order.run, order.sequence, order.round, 0)
                self._decide(result, AdmissionError(str(fault)))

    def _decide(self, result: Result, fault: StillhouseError | None) -> None:
        """Note the verdict, then tell the device, then let the rules go on."""
        attempt = self._attempt
        open_ = self._rounds.phase is Phase.COLLECTING
        order = attempt.orders.get(result.device) if attempt else None
        if not attempt or not order or result.sequence != order.sequence or not open_:
            return  # the round closed meanwhile; the device hears so when it offers again
        if known := attempt.verdicts.get(result.device):  # the first word stands
            self._receipt(known, result)
            return
        reason = str(fault)[:MAX_REASON] if fault else ""
        verdict = Verdict(result.device, fault is None, reason, result)
        with self._stalling():
            self.store.decide(attempt.sequence, verdict)
            self._decided(attempt, verdict, fault)

    def _decided(self, attempt: Attempt, verdict: Verdict, fault: StillhouseError | None) -> None:
        self.store.patience.over("intake")
        self.report.decided(verdict)
        result, now = verdict.result, time.monotonic()
        self._attempt = replace(attempt, verdicts={**attempt.verdicts, result.device: verdict})
        self._receipt(verdict, result)
        if fault:
            log.warning("%s: result refused: %s", result.device, fault)
            self._apply(rounds.failed(self._rounds, self.config.cohort, result.device, now))
        else:
            self._apply(rounds.returned(self._rounds, self.config.cohort, result.device, now))

    def _receipt(self, verdict: Verdict, result: Result) -> None:
        receipt = Receipt("result", verdict.accepted, result.run, result.sequence, verdict.reason)
        self._send(verdict.device, "order", receipt)

    def _apply(self, transition: rounds.Transition) -> None:
        self._rounds, actions = transition
        self.report.rounds(self._rounds)
        for action in actions:
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Open(number, cohort):
                self._open(number, cohort)
            case Remind(device):
                assert self._attempt is not None  # noqa: S101 - a round is open
                self._send(device, "order", self._attempt.orders[device])
            case Close(number, returned):
                log.info("round %d: aggregating %d results", number, len(returned))
                assert self._attempt is not None  # noqa: S101 - a round is open
                self._carried = {d: self._attempt.orders[d] for d in self._rounds.carried}
                begun = self._intake.clear()
                self._late = begun if self._carried else frozenset()
                verdicts = self._attempt.verdicts
                results = [verdicts[device].result for device in sorted(returned)]
                self._worker.aggregate(self._state, self._attempt, results)
            case GiveUp(number):
                raise RunError(self._hopeless(number))
            case Finish():
                log.info("run %s is finished", self.config.name)

    def _hopeless(self, number: int) -> str:
        assert self._attempt is not None  # noqa: S101 - a round was open
        reasons = {name: verdict.reason for name, verdict in self._attempt.verdicts.items()}
        name = min(reasons)
        return (
            f"round {number}: every device that was asked failed, {self._rounds.fruitless} times "
            f"in a row; {name} says: {reasons[name]}. Start the run again when the cause is gone, "
            "and it goes on with this round; if settings are the cause, begin one of another name"
        )

    def _open(self, number: int, cohort: frozenset[str]) -> None:
        self.store.patience.attempt(self._roster.opened)
        carried = {device: self._carried[device] for device in self._rounds.carried}
        births = {device: self._roster.births[device] for device in sorted(cohort - carried.keys())}
        sequence = self.store.next_sequence()
        orders = self.strategy.orders(self._state, number, sequence, births)
        self._attempt = self.store.begin(number, {**carried, **orders})
        self._intake.clear()
        self._began = time.monotonic()
        self.report.opened()
        late = f", {len(carried)} with an earlier order" if carried else ""
        log.info("round %d of %d: %d devices%s", number, self.config.rounds, len(cohort), late)
        for device, order in orders.items():
            self._send(device, "order", order)

    def _close(self, state: State, metrics: Metrics) -> None:
        assert self._attempt is not None  # noqa: S101 - a round was open
        seconds = time.monotonic() - self._began
        entry = self.report.closed(self._attempt, metrics, seconds)
        needed = self._late | referred(self._carried.values())
        self.store.close_round(self._attempt, state, entry, needed)
        self.report.kept(entry)
        self._state, self._attempt = state, None
        log.info("%s", self.report.last_round())
        if self._stopped:
            raise Interrupted
        self._apply(rounds.aggregated(self._rounds, self.config.cohort, time.monotonic()))

    def _restored(self, attempt: Attempt | None) -> rounds.RoundState:
        """Where an earlier orchestrator left off; its deadline begins anew."""
        fresh = rounds.RoundState(rounds=self.config.rounds, seed=self.config.seed)
        closed = len(self.store.closed_rounds())
        if attempt is None or attempt.closed:
            phase = Phase.FINISHED if closed >= self.config.rounds else Phase.FORMING
            if attempt:
                self._carried = attempt.carried(self.config.cohort.carry_rounds)
            ages = {name: closed + 1 - order.round for name, order in self._carried.items()}
            return replace(fresh, round=closed, phase=phase, carried=ages)
        earlier = {n: o for n, o in attempt.orders.items() if o.round < attempt.round}
        self._carried = earlier
        verdicts = attempt.verdicts.values()
        log.info("going on with round %d, %d results are here", attempt.round, len(verdicts))
        return replace(
            fresh,
            round=attempt.round,
            phase=Phase.COLLECTING,
            cohort=frozenset(attempt.orders),
            carried={name: attempt.round - order.round for name, order in earlier.items()},
            returned=frozenset(v.device for v in verdicts if v.accepted),
            failed=frozenset(v.device for v in verdicts if not v.accepted),
            deadline_s=time.monotonic() + self.config.cohort.deadline_s,
        )

    def _send(self, device: str, channel: str, message: Message, body: bytes = b"") -> None:
        payload = messages.encode(message, body)
        self.report.sent(device, len(payload))
        topic = topics.topic(self.config.fleet, device, channel)
        self.link.publish(topic, payload, qos=0 if channel == "down" else 1)
