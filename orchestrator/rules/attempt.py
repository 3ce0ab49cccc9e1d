"""An attempt at a round: each device's order, and the verdict on its result.

A round in which nobody returned is opened again, so it may take several attempts. Each has a
sequence number of its own, which new orders are given too. An order that is not answered in its
attempt may be *carried* into later ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from wire.messages import Order, Result

MAX_REASON = 500  # characters of a refusal's reason in journal, report and receipt


@dataclass(frozen=True)
class Verdict:
    """The decision on one device's result."""

    device: str
    accepted: bool
    reason: str
    result: Result


@dataclass(frozen=True)
class Attempt:
    """A round that was opened: its orders (carried ones included) and the verdicts so far.

    It is closed when its checkpoint is written: the round is done.
    """

    sequence: int
    round: int
    orders: Mapping[str, Order]
    verdicts: Mapping[str, Verdict]
    closed: bool = False
