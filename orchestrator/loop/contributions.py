"""What accepted results add to the open round, kept from their admission to the aggregation.

A payload is decoded once, when its result is admitted. Contributions are kept as far as they fit
into `KEPT_BYTES`; of a result without one (it did not fit, or the orchestrator was started again
since) the payload is admitted again when its turn comes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from orchestrator.strategies.strategy import Contribution, LearntState, Metrics, Strategy
from wire.messages import Order, Result

KEPT_BYTES = 256 << 20  # of all kept contributions together


class Contributions:
    """The contributions of the open round.

    Args:
        strategy: the algorithm.
        attempt: calls a function that may find the disk full.
    """

    def __init__(
        self,
        strategy: Strategy,
        attempt: Callable[[Callable[[], Contribution]], Contribution] = lambda admit: admit(),
    ) -> None:
        self._strategy, self._attempt = strategy, attempt
        self._kept: dict[str, tuple[Result, Contribution]] = {}

    def admit(self, state: LearntState, order: Order, result: Result) -> None:
        """Check a result, and keep what it adds if that fits.

        Raises:
            AdmissionError, WireError: why it must not enter the aggregate.
        """
        self._kept.pop(result.device, None)
        contribution = self._admitted(state, order, result)
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
        """The state after a round; contributions go to the strategy one by one.

        Args:
            state: before the round.
            round_: its number, from 1.
            orders: that the results answer, by device; a carried one is of an earlier round.
            results: the accepted ones, in the order of device names.
        """

        def contributions() -> Iterator[Any]:
            for result in results:
                admitted, contribution = self._kept.pop(result.device, (None, None))
                if admitted != result:
                    contribution = self._admitted(state, orders[result.device], result)
                yield contribution

        done = self._strategy.aggregate(state, round_, results, contributions())
        self._kept.clear()
        return done

    def _admitted(self, state: LearntState, order: Order, result: Result) -> Contribution:
        return self._attempt(lambda: self._strategy.admit(state, order, result))
