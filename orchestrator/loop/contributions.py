"""Contributions of accepted results to the open round, kept from admission to aggregation.

A payload is normally decoded once, when its result is admitted. Contributions are kept if they fit
into `KEPT_BYTES`. A result is decoded again at aggregation if its contribution was not kept: it did
not fit, the orchestrator was restarted, or another round was opened.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.strategies.strategy import Contribution, LearntState, Metrics, Strategy
from wire.messages import Order, Result

KEPT_BYTES = 256 << 20  # limit for all kept contributions together


class Contributions:
    """The contributions of the open round.

    Args:
        strategy: the algorithm.
        patiently: calls a function, and waits while the disk is full.
    """

    def __init__(
        self,
        strategy: Strategy,
        patiently: Callable[[Callable[[], Contribution]], Contribution] = lambda admit: admit(),
    ) -> None:
        self._strategy, self._patiently = strategy, patiently
        self._kept: dict[str, tuple[Result, Contribution]] = {}

    def admit(self, state: LearntState, order: Order, result: Result) -> None:
        """Check a result, and keep its contribution if it fits.

        Raises:
            AdmissionError, WireError: why the result must not enter the aggregate.
        """
        self.forget(result.device)
        contribution = self._decoded(state, order, result)
        kept = sum(each.nbytes for _, each in self._kept.values())
        if kept + contribution.nbytes <= KEPT_BYTES:
            self._kept[result.device] = result, contribution

    def aggregate(
        self,
        state: LearntState,
        round_: int,
        orders: Mapping[str, Order],
        results: Sequence[Result],
    ) -> tuple[LearntState, Metrics]:
        """The state after a round, and its metrics; the strategy gets contributions one by one.

        Args:
            state: before the round.
            round_: its number, from 1.
            orders: the orders that the results answer, by device; carried ones are of earlier
                rounds.
            results: the accepted ones, in the order of device names.
        """

        def contributions() -> Iterator[Any]:
            for result in results:
                decoded, contribution = self._kept.pop(result.device, (None, None))
                if decoded != result:
                    contribution = self._decoded(state, orders[result.device], result)
                yield contribution

        done = self._strategy.aggregate(state, round_, results, contributions())
        self.clear()
        return done

    def forget(self, device: str) -> None:
        """Drop the contribution of a device's result, which does not count."""
        self._kept.pop(device, None)

    def clear(self) -> None:
        """Drop all contributions: a round begins or was aggregated."""
        self._kept.clear()

    def _decoded(self, state: LearntState, order: Order, result: Result) -> Contribution:
        return self._patiently(lambda: self._strategy.admit(state, order, result))
