"""An attempt at a round: what each device was asked for, and what became of its result."""

from collections.abc import Mapping
from dataclasses import dataclass

from wire.messages import Order, Result

MAX_REASON = 500  # characters of a device's text that go into journal, report and receipt


@dataclass(frozen=True)
class Verdict:
    """What became of one device's result."""

    device: str
    accepted: bool
    reason: str
    result: Result


@dataclass(frozen=True)
class Attempt:
    """A round that was opened: its orders, those carried over included, and verdicts so far."""

    sequence: int
    round: int
    orders: Mapping[str, Order]
    verdicts: Mapping[str, Verdict]
    closed: bool = False

    def carried(self, rounds: int) -> dict[str, Order]:
        """Orders that are open still once the round is closed: not answered, nor too old."""
        unanswered = {n: o for n, o in self.orders.items() if n not in self.verdicts}
        return {n: o for n, o in unanswered.items() if self.round - o.round < rounds}
