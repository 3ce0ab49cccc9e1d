"""The open round, as pure rules: (round, event) -> (round, effects).

`rounds` decides by device names alone. This module adds the devices' orders and the verdicts on
their results, and so turns events into effects that can be carried out. An arrow leads from a
function, by the effects that it returns, to the function that comes next:

    follow --Begin--> begun --Send--> offered
    offered --Pull--> decided --Note, Send, Show--> ... --Aggregate--> aggregated

Nothing here touches the network, the disk or the clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from orchestrator.config import CohortConfig
from orchestrator.rules import admit, rounds
from orchestrator.rules.attempt import MAX_REASON, Attempt, Verdict
from orchestrator.rules.effects import (
    Aggregate,
    Begin,
    Effect,
    End,
    Note,
    Pull,
    Send,
    Show,
    Warn,
)
from orchestrator.rules.rounds import Close, Finish, GiveUp, Open, Phase, Remind, RoundState
from wire.errors import AdmissionError, StillhouseError
from wire.messages import Order, Receipt, Result

NOTHING_ASKED = Attempt(0, 0, {}, {}, closed=True)


@dataclass(frozen=True)
class OpenRound:
    """The open round or, between two rounds, what is carried into the next.

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
        """Orders of earlier rounds that are still open."""
        return {device: self.attempt.orders[device] for device in self.state.carried}

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


def restored(last: Attempt | None, closed: int, fresh: RoundState, rules: CohortConfig,
             now_s: float) -> OpenRound:  # fmt: skip
    """The round as an earlier orchestrator left it; an open round's deadline starts again.

    Args:
        last: the last attempt in the journal.
        closed: how many rounds are closed.
        fresh: the state that a run begins with.
        rules: of cohorts.
        now_s: the time.
    """
    if last is None or last.closed:
        left = last or NOTHING_ASKED
        orders = left.carried(rules.carry_rounds)
        state = replace(
            fresh,
            round=closed,
            phase=Phase.FINISHED if closed >= fresh.rounds else Phase.FORMING,
            carried={name: closed + 1 - order.round for name, order in orders.items()},
        )
        return OpenRound(state, replace(left, orders=orders, verdicts={}))
    ages = {name: last.round - order.round for name, order in last.orders.items()}
    verdicts = last.verdicts.values()
    state = replace(
        fresh,
        round=last.round,
        phase=Phase.COLLECTING,
        cohort=frozenset(last.orders),
        carried={name: age for name, age in ages.items() if age > 0},
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
    device, result = offer.device, offer.result
    order = now.attempt.orders.get(device)
    try:
        open_order = order if now.collecting else None
        admit.header(result, open_order, device, offer.samples, offer.limits)
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
        return now, ()  # the round closed meanwhile; the device is told when it offers again
    if known := attempt.verdicts.get(device):
        return now, (receipt(known, result),)
    verdict = _verdict(device, result, fault)
    now = replace(now, attempt=replace(attempt, verdicts={**attempt.verdicts, device: verdict}))
    ends = rounds.failed if fault else rounds.returned
    after, effects = follow(now, ends(now.state, rules, device, now_s))
    told = (Note(attempt.sequence, verdict), receipt(verdict, result), Show(verdict, fault))
    return after, (*told, *effects)


def lost(now: OpenRound, device: str, fault: Exception, rules: CohortConfig, now_s: float
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


def delayed(now: OpenRound, seconds: float) -> OpenRound:
    """The round with its deadline put off: the disk was full, and devices will offer again."""
    deadline_s = now.state.deadline_s + seconds
    return replace(now, state=replace(now.state, deadline_s=deadline_s))


def held_open(now: OpenRound, until_s: float) -> OpenRound:
    """The round with its deadline at `until_s` or later: a result is being checked."""
    deadline_s = max(now.state.deadline_s, until_s)
    return replace(now, state=replace(now.state, deadline_s=deadline_s))


def follow(now: OpenRound, transition: rounds.Transition) -> Transition:
    """A transition of `rounds`, with its actions as effects on orders and results."""
    state, actions = transition
    after = replace(now, state=state)
    return after, tuple(_effect(after, action) for action in actions)


def receipt(verdict: Verdict, result: Result) -> Send:
    """The message that tells a device what became of the result that it offers."""
    said = Receipt("result", verdict.accepted, result.run, result.sequence, verdict.reason)
    return Send(verdict.device, said)


def _effect(now: OpenRound, action: rounds.Action) -> Effect:
    attempt = now.attempt
    match action:
        case Open(number, cohort):
            return Begin(number, now.carried, cohort - now.state.carried.keys())
        case Remind(device):
            return Send(device, attempt.orders[device])
        case Close(_, returned):
            results = [attempt.verdicts[device].result for device in sorted(returned)]
            return Aggregate(attempt, tuple(results))
        case GiveUp(number):
            return End(_hopeless(number, now.state.fruitless, attempt.verdicts))
        case Finish():
            return End()


def _verdict(device: str, result: Result, fault: StillhouseError | None) -> Verdict:
    reason = str(fault)[:MAX_REASON] if fault else ""
    return Verdict(device, fault is None, reason, result)


def _hopeless(number: int, times: int, verdicts: Mapping[str, Verdict]) -> str:
    name = min(verdicts)
    return (
        f"round {number}: every device that was asked failed, {times} times "
        f"in a row; {name} says: {verdicts[name].reason}. Start the run again when the cause is "
        "gone, and it goes on with this round; if settings are the cause, begin one of another name"
    )
