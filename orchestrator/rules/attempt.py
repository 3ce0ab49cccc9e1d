"""An attempt at a round: each device's order, and the verdict on its result."""

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
    """A round that was opened: its orders (carried ones included) and the verdicts so far."""

    sequence: int
    round: int
    orders: Mapping[str, Order]
    verdicts: Mapping[str, Verdict]
    closed: bool = False

    def carried(self, rounds: int) -> dict[str, Order]:
        """Orders that stay open after the round: unanswered, and fewer than `rounds` rounds old."""
        unanswered = {n: o for n, o in self.orders.items() if n not in self.verdicts}
        return {n: o for n, o in unanswered.items() if self.round - o.round < rounds}
