"""The run's loop: takes events, applies the rules, carries out the effects.

One thread owns the round and makes all decisions. The network thread puts messages into its queue.
A worker thread checks payloads, keeps their contributions and aggregates; it puts its events into
the same queue. docs/how-a-round-works.md follows one result through all this.
"""

import contextlib
import logging
import math
import queue
from collections.abc import Callable
from time import monotonic

from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet.certificates import Certifier
from orchestrator.fleet.roster import Roster
from orchestrator.fleet.updates import Rollout
from orchestrator.loop import stop
from orchestrator.loop.fleet_link import FleetLink, Heard
from orchestrator.loop.full_disk import FullDisk
from orchestrator.loop.intake import Intake
from orchestrator.loop.stop import Stopped
from orchestrator.loop.worker import Aggregated, Failed, ResultChecked, Worker, WorkerEvent
from orchestrator.rules import open_round, rounds
from orchestrator.rules.effects import Effect, Note, Pull, Send, Show, Warn
from orchestrator.rules.open_round import Offer
from orchestrator.rules.rounds import Aggregate, Finish, GiveUp, Open, Phase, RoundState, Session
from orchestrator.run_folder.store import Store, referred
from orchestrator.strategies.strategy import LearntState, Metrics, Strategy
from wire import stopping, storage, topics
from wire.address import BrokerAddress
from wire.errors import AdmissionError, RunError, StillhouseError, TransferError
from wire.link import Arrived, Connected, LinkEvent, Lost
from wire.messages import Birth, Chunk, Death, Gone, Measured, Result, Sign, Telemetry, Want

log = logging.getLogger("orchestrator")

TICK_S = 0.25
LOOK_S = 1.0  # from one look for revoked devices to the next
HELD_OPEN_S = 1.0  # longer than a tick: the deadline cannot end the round before the next one

Event = LinkEvent | WorkerEvent | Stopped


class Coordinator:
    """One run over one broker.

    Args:
        config: of the run.
        store: the run's folder.
        strategy: the algorithm.
        enrolled: devices that may take part; None: any.
        address: the broker.
        report: is told what happens.
        rollout: package updates to announce to devices.
        again: the command that resumes the run; None: this process's.
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
        self._rules = config.cohort
        self.report = report
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._roster = Roster(
            config, enrolled, rollout, lambda device, order: self._link.send(device, "order", order)
        )
        self._worker = Worker(strategy, store.patience, self._events.put)
        self._intake = Intake(store.blobs, config.transfer_chunks, config.retry_s)
        self._disk = FullDisk(store.patience, store.folder)
        self._again = again
        checkpoint = store.checkpoint()
        self._learnt = strategy.restore(checkpoint) if checkpoint else strategy.begin()
        fresh = RoundState(rounds=config.rounds, seed=config.seed, retries=store.retries())
        last = store.last_attempt()
        self._round = open_round.restored(last, fresh, self._rules, monotonic())
        if self._round.collecting:
            done = len(self._round.attempt.verdicts)
            log.info("going on with round %d, %d results are here", self._round.state.round, done)
        self._late: frozenset[str] = frozenset()  # blobs of results undecided when the round ended
        self._began = monotonic()
        self._ticked_s = self._looked_s = -math.inf
        self._certifier: Certifier | None = None
        if config.broker.mutual_tls:
            self._certifier = Certifier(
                config, lambda user, message: self._link.send(user, "order", message)
            )
        self._link = FleetLink(
            config,
            store.run_id,
            address,
            report=report,
            emit=self._events.put,
            sealer=self._certifier.sealer if self._certifier else None,
        )

    def run(self, changed: Callable[[], None] = lambda: None) -> None:
        """Run until all rounds are done; `changed` is called after each event.

        Raises:
            LinkError: the broker refuses us, and trying again is useless.
            RunError: another run has the fleet, or every device failed `rounds.FRUITLESS` times
                in a row.
            StillhouseError: the strategy failed.
            Interrupted: a person or the system asked for the end.
        """
        if self.finished():
            return
        with stop.heard(self._answer, self._events.put):
            self._link.start()
            try:
                if self._round.collecting:
                    self._follow(rounds.ticked(self._round.state, self._rules, monotonic()))
                while not self.finished():
                    if self._round.state.phase is not Phase.AGGREGATING:
                        stop.check()
                    with contextlib.suppress(queue.Empty):
                        self._handle(self._events.get(timeout=TICK_S))
                    now_s = monotonic()
                    due = self._events.empty() or now_s - self._ticked_s >= TICK_S
                    if self._link.ticked(now_s) and due:
                        self._tick(now_s)
                    changed()
            finally:
                self._link.close()
                self._worker.end(wait=not stopping.asked.is_set())

    def _answer(self) -> str:
        waiting = self.store.patience.waiting
        return stop.answer(self._round, self.report, self._again, waiting=waiting)

    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._round.state.phase is Phase.FINISHED

    def _handle(self, event: Event) -> None:
        match event:
            case Arrived() | Connected() | Lost():
                if heard := self._link.read(event):
                    self._received(heard)
            case ResultChecked(result, fault):
                self._intake.checked(result.device)
                self._apply(
                    open_round.decided(self._round, result, fault, self._rules, monotonic())
                )
                if not self._round.counts(result):
                    self._worker.forget(result.device)
            case Aggregated(state, metrics):
                self._close(state, metrics)
            case Failed(fault):
                stop.check(fault)
                with storage.at(self.store.folder):
                    raise fault
            case Stopped():
                pass

    def _received(self, heard: Heard) -> None:
        device, message, body = heard
        if topics.joined(device) != device and not isinstance(message, Sign):
            return
        match message:
            case Birth():
                self._born(device, message)
            case Death(session=number, state_id=state_id):
                self._roster.died(device, number, state_id)
                self._follow(rounds.died(self._round.state, device, Session(number, state_id)))
            case Telemetry():
                if message.run == self.store.run_id and device in self._roster.births:
                    self.report.telemetry(device, message)
            case Result():
                self._offered(device, message)
            case Measured():
                self._roster.measured(device, message, bytes(body), monotonic())
                self._link.take_away(device, "telemetry")
            case Want():
                if device in self._roster.births:
                    self._link.answer(device, message, self.store.blobs)
            case Chunk() | Gone():
                self._pull(device, lambda: self._take(device, message, body))
            case Sign():
                self._certify(device, message)
            case _:
                pass

    def _certify(self, device: str, message: Sign) -> None:
        if certifier := self._certifier:  # on a full disk the device asks again
            self._disk.takes(lambda: certifier.asked(device, message))

    def _born(self, device: str, message: Birth) -> None:
        session, state = Session(message.session, message.state_id), self._round.state
        if rounds.overtaken(state, device, session):
            return
        before = self._roster.births.get(device)
        if birth := self._roster.born(device, message, monotonic()):
            self.report.born(device, birth)
            if before and before.state_id != birth.state_id:
                self._intake.drop(device)  # the result that it offered is gone
            self._intake.resume(device)
            self._follow(rounds.born(state, self._rules, device, session, monotonic()))
        elif message.device == device:
            self._turn_away(device, self._roster.refused[device])

    def _turn_away(self, device: str, reason: str) -> None:
        """Refuse a device: it gets no order, and a result that it still owes is refused.

        A result that was accepted before still counts.
        """
        self.report.turned_away(device, reason)
        if session := self._round.state.live.get(device):
            self._follow(rounds.died(self._round.state, device, session))
        self._lose(device, AdmissionError(reason))

    def _offered(self, device: str, result: Result) -> None:
        ours = result.run == self.store.run_id
        if ours and (known := self.store.verdict(result.sequence, device)):
            self._apply((self._round, (open_round.receipt(known, result),)))
        elif birth := self._roster.births.get(device):
            offer = Offer(device, result, birth.samples, self.strategy.task.limits)
            self._apply(open_round.offered(self._round, offer, self._rules, monotonic()))
        # Else the device is not enrolled, or its birth is still on the way: it will offer again.

    def _take(self, device: str, message: Chunk | Gone, body: memoryview) -> None:
        if self._intake.take(device, message, body):
            self._disk.over()

    def _pull(self, device: str, work: Callable[[], None]) -> None:
        """Do some work on a device's blobs; if the device sends wrong ones, its result is refused.

        A full disk puts the work off, and a failing disk ends the run.
        """
        try:
            self._disk.takes(work)
        except TransferError as fault:
            self._lose(device, fault)

    def _lose(self, device: str, fault: StillhouseError) -> None:
        self._intake.drop(device)
        self._apply(open_round.lost(self._round, device, fault, self._rules, monotonic()))

    def _tick(self, now_s: float) -> None:
        self._ticked_s = now_s
        until_s = self._round.state.deadline_s + self._disk.delay(now_s)
        for result in self._intake.complete():
            self._worker.check(self._learnt, self._round.attempt.orders[result.device], result)
        if self._intake.checking:  # not for ever: a device gets one verdict a round
            until_s = max(until_s, now_s + HELD_OPEN_S)
        self._round = open_round.held_open(self._round, until_s)
        lost: list[tuple[str, TransferError]] = []
        self._disk.takes(lambda: self._ask(now_s, lost))
        for device, fault in lost:
            self._lose(device, fault)
        if now_s - self._looked_s >= LOOK_S:
            self._looked_s = now_s
            for device, reason in self._roster.revoked().items():
                self._roster.turn_away(device, reason)
                self._turn_away(device, reason)
        self._roster.ticked(now_s)
        if self._certifier:
            self._certifier.ticked(now_s, self._roster.births)
        self._follow(rounds.ticked(self._round.state, self._rules, now_s))

    def _ask(self, now_s: float, lost: list[tuple[str, TransferError]]) -> None:
        """Ask devices for chunks; adds to `lost` those whose result cannot be pulled."""
        for device, want in self._intake.wants(now_s, frozenset(self._round.state.live)):
            if isinstance(want, Want):
                self._link.send(device, "down", want)
            else:
                lost.append((device, want))

    def _follow(self, transition: rounds.Transition) -> None:
        """Apply a transition of `rounds`, which knows devices by name only."""
        self._apply(open_round.follow(self._round, transition))

    def _apply(self, transition: open_round.Transition) -> None:
        """Carry out an event's effects, unless the disk is too full to note them in the journal.

        `Open` and `Pull` may apply a transition of their own in here. That is safe: the round is
        set before any effect, and these two come last.
        """
        after, effects = transition
        notes = [effect for effect in effects if isinstance(effect, Note)]
        if not self._disk.takes(lambda: self._note(notes)):
            return
        self._round = after
        for effect in effects:
            self._carry_out(effect)
        self.report.rounds(self._round.state)

    def _note(self, notes: list[Note]) -> None:
        for note in notes:
            self.store.decide(note.sequence, note.verdict)
            self._disk.over()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Note():
                pass  # already in the journal
            case Send(device, message):
                self._link.send(device, "order", message)
            case Show(verdict, fault):
                self.report.decided(verdict)
                if fault:
                    log.warning("%s: result refused: %s", verdict.device, fault)
            case Warn(device, fault):
                log.warning("%s: result refused: %s", device, fault)
            case Pull(result):
                self._pull(result.device, lambda: self._intake.begin(result))
            case Open(number, cohort):
                self._open(number, cohort)
            case Aggregate(number):
                results = self._round.accepted
                log.info("round %d: aggregating %d results", number, len(results))
                self._late = self._intake.clear()
                self._worker.aggregate(self._learnt, self._round.attempt, results)
            case GiveUp():
                raise RunError(self._round.hopeless)
            case Finish():
                log.info("run %s is finished", self.config.name)

    def _open(self, number: int, cohort: frozenset[str]) -> None:
        """Write a round's orders into the journal, then send them to the devices."""
        self.store.patience.attempt(self._roster.opened)
        carried = self._round.carried
        births = {device: self._roster.births[device] for device in sorted(cohort - carried.keys())}
        sequence = self.store.next_sequence()
        orders = self.strategy.orders(self._learnt, number, sequence, births)
        attempt = self.store.begin(number, {**carried, **orders})
        self._intake.clear()
        self._worker.clear()
        self._began = monotonic()
        self.report.opened()
        late = f", {len(carried)} with an earlier order" if carried else ""
        count = len(attempt.orders)
        log.info("round %d of %d: %d devices%s", number, self.config.rounds, count, late)
        self._apply(open_round.begun(self._round, attempt, self._rules, monotonic()))

    def _close(self, learnt: LearntState, metrics: Metrics) -> None:
        """Write what was learnt into the run's folder, show it, then tell the rules."""
        attempt, carried = self._round.attempt, self._round.carried
        entry = self.report.closed(attempt, metrics, monotonic() - self._began)
        needed = self._late | referred(carried.values()) if carried else ()
        self.store.close_round(attempt, learnt.pack(), entry, needed)
        self.report.kept(entry)
        self._learnt = learnt
        log.info("%s", self.report.last_round())
        stop.check()
        self._apply(open_round.aggregated(self._round, self._rules, monotonic()))
