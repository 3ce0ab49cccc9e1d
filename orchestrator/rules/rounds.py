"""A round, as pure rules: (state, event) -> (state, actions).

    forming --cohort there--> collecting --round closes--> aggregating --+--> finished
       ^                           | nobody returned                     |
       +---------------------------+-------------------------------------+

A round closes at the quorum, at the deadline, or when everyone has answered. Nobody has returned if
no result was accepted by then.

A device that has not answered when the results are aggregated may keep its order for `carry_rounds`
more rounds (asynchronous rounds). It belongs to their cohorts too, and gets no other order
meanwhile.

Each opening of a round is an attempt at it. After one in which nobody returned there is another,
with other devices if there are more than a cohort takes. If in `FRUITLESS` attempts in a row all
devices that were asked reported a fault or were refused, the run gives up: the same orders would
fail again.

Nothing here touches the network, the disk or the clock; times are monotonic seconds, passed in.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import numpy as np

from orchestrator.config import CohortConfig
from wire import seeds

PAUSE_S = 10.0
FRUITLESS = 3
ASKED = 10  # the run gives up only if this many different devices failed, or all that are there


class Phase(Enum):
    """A phase of a run."""

    FORMING = "forming"
    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    FINISHED = "finished"


class Session(NamedTuple):
    """A connection of a device, numbered by the device's state folder."""

    number: int
    state_id: str = ""


@dataclass(frozen=True)
class RoundState:
    """One run's rounds.

    Attributes:
        rounds: how many rounds the run has.
        seed: of the run.
        round: the open round; between two rounds or attempts, the last that was aggregated.
        live: the session of each device that is there.
        state_ids: the state folder that each device last came with, since this process began.
        cohort: devices with an order of this round, or with a carried one of an earlier round.
        ages: how many attempts each carried order has outlived, by device.
        returned: devices of the cohort whose result was accepted.
        failed: devices of the cohort that reported a fault or were refused.
        ready_at_s: when the cohort may be formed, once there are enough devices.
        deadline_s: when the open round takes no more results.
        retries: how many attempts at the open round ended before this one.
        fruitless: in how many of them, the latest in a row, every device failed. A restart counts
            from 0 again: whoever starts a run that gave up has mended something.
        faulty: devices that failed in these attempts.
        not_before_s: earliest time of the next attempt after a round in which nobody returned.
    """

    rounds: int
    seed: int
    round: int = 0
    phase: Phase = Phase.FORMING
    live: Mapping[str, Session] = field(default_factory=dict)
    state_ids: Mapping[str, str] = field(default_factory=dict)
    cohort: frozenset[str] = frozenset()
    ages: Mapping[str, int] = field(default_factory=dict)
    returned: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()
    ready_at_s: float | None = None
    deadline_s: float = 0.0
    retries: int = 0
    fruitless: int = 0
    faulty: frozenset[str] = frozenset()
    not_before_s: float = 0.0


@dataclass(frozen=True)
class Open:
    """Begin a round: give each device of the cohort an order, unless its order is carried."""

    round: int
    cohort: frozenset[str]


@dataclass(frozen=True)
class Remind:
    """Send a device its order again: it was born again and has not returned."""

    device: str


@dataclass(frozen=True)
class Aggregate:
    """Aggregate the results of the devices in `returned`; `aggregated` follows."""

    round: int
    returned: frozenset[str]


@dataclass(frozen=True)
class GiveUp:
    """End the run: every device that was asked failed, in this attempt and the ones before."""

    round: int


@dataclass(frozen=True)
class Finish:
    """End the run: all rounds are done."""


Action = Open | Remind | Aggregate | GiveUp | Finish
Transition = tuple[RoundState, tuple[Action, ...]]


def overtaken(state: RoundState, device: str, session: Session) -> bool:
    """Whether a birth comes after that of a newer session of the same state folder."""
    known = state.live.get(device, session)
    return known.state_id == session.state_id and session.number < known.number


def born(
    state: RoundState, rules: CohortConfig, device: str, session: Session, now_s: float
) -> Transition:
    """Event: a device is there. A birth that another has overtaken is ignored.

    A device with another state folder than before (after a new card, say) has lost its order.
    """
    if overtaken(state, device, session):
        return state, ()
    new_life = state.state_ids.get(device, session.state_id) != session.state_id
    state = replace(
        state,
        live={**state.live, device: session},
        state_ids={**state.state_ids, device: session.state_id},
    )
    waiting = device in state.cohort - state.returned - state.failed
    if state.phase is Phase.COLLECTING and waiting:
        return state, (Remind(device),)
    if new_life and state.phase is not Phase.COLLECTING:
        ages = {name: age for name, age in state.ages.items() if name != device}
        state = replace(state, ages=ages)
    return ticked(state, rules, now_s)


def died(state: RoundState, device: str, session: Session) -> Transition:
    """Event: a connection ended; the will of another session does not end this one."""
    if state.live.get(device) != session:
        return state, ()
    live = {name: known for name, known in state.live.items() if name != device}
    return replace(state, live=live), ()


def returned(state: RoundState, rules: CohortConfig, device: str, now_s: float) -> Transition:
    """Event: a device's result was accepted."""
    if device not in state.cohort:
        return state, ()
    return ticked(replace(state, returned=state.returned | {device}), rules, now_s)


def failed(state: RoundState, rules: CohortConfig, device: str, now_s: float) -> Transition:
    """Event: a device reported a fault or its result was refused; the round goes on without it."""
    if device not in state.cohort:
        return state, ()
    return ticked(replace(state, failed=state.failed | {device}), rules, now_s)


def ticked(state: RoundState, rules: CohortConfig, now_s: float) -> Transition:
    """Event: time passed. Form a cohort or aggregate a round if it is due."""
    if state.phase is Phase.FORMING:
        return _form(state, rules, now_s)
    if state.phase is Phase.COLLECTING:
        return _collect(state, rules, now_s)
    return state, ()


def aggregated(state: RoundState, rules: CohortConfig, now_s: float) -> Transition:
    """Event: the open round was aggregated."""
    if state.round >= state.rounds:
        return replace(state, phase=Phase.FINISHED, cohort=frozenset()), (Finish(),)
    forming = replace(
        state,
        phase=Phase.FORMING,
        cohort=frozenset(),
        ready_at_s=now_s,
        retries=0,
        fruitless=0,
        faulty=frozenset(),
    )
    return _form(forming, rules, now_s)


def _form(state: RoundState, rules: CohortConfig, now_s: float) -> Transition:
    if now_s < state.not_before_s:
        return state, ()
    if len(state.live) < rules.min_devices:
        return replace(state, ready_at_s=None), ()
    ready_at_s = now_s + rules.wait_s if state.ready_at_s is None else state.ready_at_s
    full = bool(rules.max_devices) and len(state.live) >= rules.max_devices
    if not (full or now_s >= ready_at_s):
        return replace(state, ready_at_s=ready_at_s), ()
    number = state.round + 1
    free = state.live.keys() - state.ages.keys()
    room = (rules.max_devices or len(state.live)) - len(state.ages.keys() & state.live.keys())
    chosen = choose(free, room, state.seed, number, state.retries) if room > 0 else frozenset()
    cohort = chosen | state.ages.keys()
    opened = replace(
        state,
        round=number,
        phase=Phase.COLLECTING,
        cohort=cohort,
        returned=frozenset(),
        failed=frozenset(),
        ready_at_s=None,
        deadline_s=now_s + rules.deadline_s,
    )
    return opened, (Open(number, cohort),)


def _collect(state: RoundState, rules: CohortConfig, now_s: float) -> Transition:
    # A device that is gone with an order of an earlier round may answer, but is not waited for.
    # After a restart no device is live yet: only one that has been here since can be gone.
    gone = (state.ages.keys() & state.state_ids.keys()) - state.live.keys()
    gone -= state.returned | state.failed
    enough = math.ceil(rules.quorum * len(state.cohort - gone) - 1e-9)
    answered = state.returned | state.failed == state.cohort - gone
    all_failed = answered and bool(state.failed) and not state.returned
    due = now_s >= state.deadline_s
    if not (len(state.returned) >= enough or answered or due):
        return state, ()
    if not state.returned:
        # Nothing to aggregate: the same round is formed again. The pause keeps a fleet whose
        # devices all fail from being asked in a tight loop.
        again = replace(
            state,
            phase=Phase.FORMING,
            round=state.round - 1,
            cohort=frozenset(),
            ages={
                name: age + 1
                for name, age in state.ages.items()
                if name not in state.failed and age < rules.carry_rounds
            },
            ready_at_s=now_s,
            not_before_s=now_s + PAUSE_S,
            retries=state.retries + 1,
            fruitless=state.fruitless + 1 if all_failed else 0,
            faulty=state.faulty | state.failed if all_failed else frozenset(),
        )
        asked = len(again.faulty) >= ASKED or not again.live.keys() - again.faulty
        hopeless = again.fruitless >= FRUITLESS and asked
        return again, (GiveUp(state.round),) if hopeless else ()
    open_ = state.cohort - state.returned - state.failed
    ages = {device: state.ages.get(device, 0) + 1 for device in open_}
    ages = {device: age for device, age in ages.items() if age <= rules.carry_rounds}
    state = replace(state, phase=Phase.AGGREGATING, ages=ages)
    return state, (Aggregate(state.round, state.returned),)


def choose(
    live: Collection[str], most: int, seed: int, number: int, retries: int = 0
) -> frozenset[str]:
    """A uniform sample of at most `most` live devices (0: all), the same for the same seed.

    Each retry takes the next devices of the same shuffled order, and wraps at its end.
    """
    names = sorted(live)
    if not most or len(names) <= most:
        return frozenset(names)
    order = seeds.raw(seed, number, len(names)).argsort(kind="stable")
    turn = (retries * most + np.arange(most)) % len(names)
    return frozenset(names[i] for i in order[turn])
