"""The thread that does a run's heavy work: checking payloads and aggregating."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from orchestrator.loop.contributions import Contributions
from orchestrator.rules.attempt import Attempt
from orchestrator.strategies.strategy import LearntState, Metrics, Strategy
from wire.errors import AdmissionError, RunError, StillhouseError, StorageError
from wire.messages import Order, Result
from wire.storage import Patience

log = logging.getLogger("orchestrator")


class ResultChecked(NamedTuple):
    """A result was checked; `fault` says why it is refused, None accepts it."""

    result: Result
    fault: StillhouseError | None


class Aggregated(NamedTuple):
    """A round was aggregated: the new state and its metrics."""

    state: LearntState
    metrics: Metrics


class Failed(NamedTuple):
    """The worker failed by a fault of ours, not of a device."""

    fault: BaseException


WorkerEvent = ResultChecked | Aggregated | Failed


class Worker:
    """A thread that does one job after the other, and passes its event to `emit`.

    Args:
        strategy: the algorithm.
        patience: waits while the disk is full.
        emit: takes each event, in the worker's thread.
    """

    def __init__(
        self, strategy: Strategy, patience: Patience, emit: Callable[[WorkerEvent], None]
    ) -> None:
        self._contributions = Contributions(strategy, patience.attempt)
        self._emit = emit
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="work")

    def check(self, state: LearntState, order: Order, result: Result) -> None:
        """Check the result of an order, and keep its contribution; emits ResultChecked."""
        self._submit(lambda: self._check(state, order, result))

    def aggregate(self, state: LearntState, attempt: Attempt, results: Sequence[Result]) -> None:
        """Aggregate a round's results; emits Aggregated."""
        aggregate = self._contributions.aggregate
        self._submit(lambda: Aggregated(*aggregate(state, attempt.round, attempt.orders, results)))

    def forget(self, device: str) -> None:
        """Drop the contribution of a device's result, which does not count."""
        self._threads.submit(self._contributions.forget, device)

    def clear(self) -> None:
        """Drop all contributions: a round begins."""
        self._threads.submit(self._contributions.clear)

    def end(self, *, wait: bool) -> None:
        """Begin no more jobs; `wait` for the one under way."""
        self._threads.shutdown(wait=wait, cancel_futures=True)

    def _check(self, state: LearntState, order: Order, result: Result) -> WorkerEvent:
        try:
            self._contributions.admit(state, order, result)
        except (StorageError, RunError, OSError, MemoryError):  # our faults, not the device's
            raise
        except StillhouseError as fault:
            return ResultChecked(result, fault)
        except Exception as fault:  # a hostile payload ends its result, not the run
            log.exception("%s: its result cannot be looked over", result.device)
            return ResultChecked(result, AdmissionError(f"it cannot be read: {fault!r}"))
        return ResultChecked(result, None)

    def _submit(self, work: Callable[[], WorkerEvent]) -> None:
        def done(future: Future[WorkerEvent]) -> None:
            if future.cancelled():
                return
            fault = future.exception()
            self._emit(Failed(fault) if fault else future.result())

        self._threads.submit(work).add_done_callback(done)
