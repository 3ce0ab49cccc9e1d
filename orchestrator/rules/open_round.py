"""The open round, as pure rules: (round, event) -> (round, effects).

`rounds` decides by device names alone. This module adds the devices' orders and the verdicts on
their results. An arrow leads from a function, by the effects that it returns, to the function that
comes next:

    follow --Open--> begun --Send--> offered
    offered --Pull--> decided --Note, Send, Show--> ... --Aggregate--> aggregated

Nothing here touches the network, the disk or the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.config import CohortConfig
from orchestrator.rules import admit, rounds
from orchestrator.rules.attempt import MAX_REASON, Attempt, Verdict
from orchestrator.rules.effects import Effect, Note, Pull, Send, Show, Warn
from orchestrator.rules.rounds import Phase, Remind, RoundState
from wire.errors import AdmissionError, StillhouseError
from wire.messages import Order, Receipt, Result

NOTHING_ASKED = Attempt(0, 0, {}, {}, closed=True)


@dataclass(frozen=True)
class OpenRound:
    """The open round or, between two rounds, the orders that are carried into the next.

    Both attributes say who was asked and who has answered. The attempt is the authority: the
    journal holds it, and `restored` makes the state from it.

    Attributes:
        state: who is there, who was asked, who has answered.
        attempt: the orders that may be answered, those of earlier rounds included, and the verdicts
            so far; between two rounds, only the carried orders.
    """

    state: RoundState
    attempt: Attempt = NOTHING_ASKED

    @property
    def collecting(self) -> bool:
        """Whether the round takes results."""
        return self.state.phase is Phase.COLLECTING

    @property
    def carried(self) -> dict[str, Order]:
        """Orders of earlier attempts that are still open."""
        return {device: self.attempt.orders[device] for device in self.state.ages}

    @property
    def accepted(self) -> tuple[Result, ...]:
        """The accepted results, in the order of device names."""
        verdicts = self.attempt.verdicts
        return tuple(verdicts[device].result for device in sorted(self.state.returned))

    @property
    def hopeless(self) -> str:
        """Why the run gives up after this attempt."""
        name = min(self.attempt.verdicts)
        return (
            f"round {self.attempt.round}: every device that was asked failed, "
            f"{self.state.fruitless} times in a row; {name} says: "
            f"{self.attempt.verdicts[name].reason}. Start the run again when the cause is gone, "
            "and it goes on with this round; if settings are the cause, begin one of another name"
        )

    def counts(self, result: Result) -> bool:
        """Whether a result was accepted in this round."""
        verdict = self.attempt.verdicts.get(result.device)
        return verdict is not None and verdict.accepted and verdict.result == result


class Offer(NamedTuple):
    """A result as it came.

    Attributes:
        device: the name in the topic, which the broker's access list guards.
        result: what the device offers.
        samples: how many samples the device announced in its birth message.
        limits: most bytes of a payload, by its name.
    """

    device: str
    result: Result
    samples: int
    limits: Mapping[str, int]


Transition = tuple[OpenRound, tuple[Effect, ...]]


def restored(
    last: Attempt | None, fresh: RoundState, rules: CohortConfig, now_s: float
) -> OpenRound:
    """The round as an earlier orchestrator left it; an open round's deadline starts again.

    Args:
        last: the last attempt in the journal.
        fresh: the state that a run begins with.
        rules: of cohorts.
        now_s: the time.
    """
    last = last or NOTHING_ASKED
    verdicts = last.verdicts.values()
    ages = {name: last.sequence - order.sequence for name, order in last.orders.items()}
    if last.closed:
        ages = {
            name: age + 1
            for name, age in ages.items()
            if name not in last.verdicts and age < rules.carry_rounds
        }
        phase = Phase.FINISHED if last.round >= fresh.rounds else Phase.FORMING
        state = replace(fresh, round=last.round, phase=phase, ages=ages)
        orders = {name: last.orders[name] for name in ages}
        return OpenRound(state, replace(last, orders=orders, verdicts={}))
    state = replace(
        fresh,
        round=last.round,
        phase=Phase.COLLECTING,
        cohort=frozenset(last.orders),
        ages={name: age for name, age in ages.items() if age > 0},
        returned=frozenset(v.device for v in verdicts if v.accepted),
        failed=frozenset(v.device for v in verdicts if not v.accepted),
        deadline_s=now_s + rules.deadline_s,
    )
    return OpenRound(state, last)


def begun(now: OpenRound, attempt: Attempt, rules: CohortConfig, now_s: float) -> Transition:
    """Event: the round's orders are in the journal. Each is sent, and the deadline starts.

    A carried order is sent again, since it may have been lost. A device that has it goes on.
    """
    state = replace(now.state, deadline_s=now_s + rules.deadline_s)
    sends = tuple(Send(name, order) for name, order in attempt.orders.items())
    return OpenRound(state, attempt), sends


def offered(now: OpenRound, offer: Offer, rules: CohortConfig, now_s: float) -> Transition:
    """Event: a device offers a result that has no verdict yet."""
    device, result, samples, limits = offer
    order = now.attempt.orders.get(device)
    try:
        admit.header(result, order if now.collecting else None, device, samples, limits)
    except StillhouseError as fault:
        answers = order and (result.run, result.sequence) == (order.run, order.sequence)
        if answers and result.device == device:
            return decided(now, result, fault, rules, now_s)
        # Its round is closed, its run is not ours, or it names another device: nothing to note.
        return now, (receipt(_verdict(device, result, fault), result), Warn(device, fault))
    return now, (Pull(result),)


def decided(
    now: OpenRound,
    result: Result,
    fault: StillhouseError | None,
    rules: CohortConfig,
    now_s: float,
) -> Transition:
    """Event: a result was checked; `fault` says why it is refused. The first verdict stands."""
    device, attempt = result.device, now.attempt
    order = attempt.orders.get(device)
    if not now.collecting or order is None or result.sequence != order.sequence:
        return now, ()  # the attempt ended meanwhile; the device is told when it offers again
    if known := attempt.verdicts.get(device):
        return now, (receipt(known, result),)
    verdict = _verdict(device, result, fault)
    now = replace(now, attempt=replace(attempt, verdicts={**attempt.verdicts, device: verdict}))
    ends = rounds.failed if fault else rounds.returned
    after, effects = follow(now, ends(now.state, rules, device, now_s))
    told = (Note(attempt.sequence, verdict), receipt(verdict, result), Show(verdict, fault))
    return after, (*told, *effects)


def lost(now: OpenRound, device: str, fault: StillhouseError, rules: CohortConfig, now_s: float
         ) -> Transition:  # fmt: skip
    """Event: a device's result cannot be pulled. It is refused; the round goes on without it."""
    order = now.attempt.orders.get(device)
    if order is None:
        return now, ()
    result = Result(device, order.run, order.sequence, order.round, 0)
    return decided(now, result, AdmissionError(str(fault)), rules, now_s)


def aggregated(now: OpenRound, rules: CohortConfig, now_s: float) -> Transition:
    """Event: the round was aggregated. Carried orders stay open."""
    left = replace(now.attempt, orders=now.carried, verdicts={}, closed=True)
    return follow(replace(now, attempt=left), rounds.aggregated(now.state, rules, now_s))


def held_open(now: OpenRound, until_s: float) -> OpenRound:
    """The round with its deadline at `until_s` or later.

    A result is being checked, or the disk was full, and devices will offer theirs again.
    """
    deadline_s = max(now.state.deadline_s, until_s)
    return replace(now, state=replace(now.state, deadline_s=deadline_s))


def follow(now: OpenRound, transition: rounds.Transition) -> Transition:
    """A transition of `rounds`, in which a reminder becomes the order to send."""
    state, actions = transition
    orders = now.attempt.orders
    return replace(now, state=state), tuple(
        Send(action.device, orders[action.device]) if isinstance(action, Remind) else action
        for action in actions
    )


def receipt(verdict: Verdict, result: Result) -> Send:
    """The message that tells a device what became of the result that it offers."""
    said = Receipt("result", verdict.accepted, result.run, result.sequence, verdict.reason)
    return Send(verdict.device, said)


def _verdict(device: str, result: Result, fault: StillhouseError | None) -> Verdict:
    reason = str(fault)[:MAX_REASON] if fault else ""
    return Verdict(device, fault is None, reason, result)
