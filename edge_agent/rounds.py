"""The device's side of a round, as pure rules: (state, event) -> (state, actions).

    idle --order--> fetching --all blobs here--> working --result--> offering --receipt--> idle
                       |                                                ^
                       +------- result: they cannot be pulled ----------+

A newer order, or one of another run, replaces the open one at any point. If the last order comes
again when it is done, its result is offered again. Nothing here touches the network, the disk or
the clock.
"""

from dataclasses import dataclass, replace
from enum import Enum

from wire.messages import Order, Receipt, Result


class Phase(Enum):
    """Where the device stands with its order."""

    IDLE = "idle"
    FETCHING = "fetching"
    WORKING = "working"
    OFFERING = "offering"


@dataclass(frozen=True)
class RoundState:
    """The open or last order, its result if there is one, and when to offer that again."""

    phase: Phase = Phase.IDLE
    order: Order | None = None
    result: Result | None = None
    offer_at_s: float = 0.0


@dataclass(frozen=True)
class Accept:
    """Write the order to the journal, and cancel work on another."""

    order: Order


@dataclass(frozen=True)
class Fetch:
    """Pull the blobs and the artifact that the order names."""

    order: Order


@dataclass(frozen=True)
class Work:
    """Do the order's work."""

    order: Order


@dataclass(frozen=True)
class Offer:
    """Publish the result."""

    result: Result


@dataclass(frozen=True)
class Settle:
    """Journal the receipt of the result, and remove the result's blobs."""

    receipt: Receipt


Action = Accept | Fetch | Work | Offer | Settle
Transition = tuple[RoundState, tuple[Action, ...]]


def restored(order: Order, result: Result | None, *, receipted: bool) -> Transition:
    """Continue after a restart, with the last order in the journal and its result."""
    if result is None:
        return RoundState(Phase.FETCHING, order), (Fetch(order),)
    phase = Phase.IDLE if receipted else Phase.OFFERING
    return RoundState(phase, order, result), ()


def ordered(state: RoundState, order: Order, now_s: float, resend_s: float) -> Transition:
    """An order came.

    An order older than the current one of its run changes nothing. If the current one is repeated,
    its result is offered again, if there is one. Any other order replaces the current one.
    """
    current = state.order
    if current and current.run == order.run and order.sequence <= current.sequence:
        if order.sequence == current.sequence and state.result:
            again = replace(state, phase=Phase.OFFERING, offer_at_s=now_s + resend_s)
            return again, (Offer(state.result),)
        return state, ()
    return RoundState(Phase.FETCHING, order), (Accept(order), Fetch(order))


def fetched(state: RoundState) -> Transition:
    """Everything that the open order names has been pulled."""
    if state.phase is not Phase.FETCHING or state.order is None:
        return state, ()
    return replace(state, phase=Phase.WORKING), (Work(state.order),)


def worked(state: RoundState, result: Result, now_s: float, resend_s: float) -> Transition:
    """The work ended, with success or a fault, or the pull of what it needs failed.

    The result of a replaced order is dropped.
    """
    order = state.order
    if order is None or (order.run, order.sequence) != (result.run, result.sequence):
        return state, ()
    return RoundState(Phase.OFFERING, order, result, now_s + resend_s), (Offer(result),)


def received(state: RoundState, receipt: Receipt) -> Transition:
    """A receipt came; only the one for the offered result counts."""
    result = state.result
    if state.phase is not Phase.OFFERING or result is None:
        return state, ()
    if (receipt.run, receipt.sequence) != (result.run, result.sequence):
        return state, ()
    return replace(state, phase=Phase.IDLE), (Settle(receipt),)


def ticked(state: RoundState, now_s: float, resend_s: float) -> Transition:
    """Time passed; a result without a receipt is offered again when that is due."""
    if state.phase is Phase.OFFERING and state.result and now_s >= state.offer_at_s:
        return replace(state, offer_at_s=now_s + resend_s), (Offer(state.result),)
    return state, ()
