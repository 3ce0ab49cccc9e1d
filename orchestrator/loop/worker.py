"""The thread that does a run's heavy part: checking payloads, aggregation."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from orchestrator.loop.contributions import Contributions
from orchestrator.rules.attempt import Attempt
from orchestrator.strategies.strategy import LearntState, Metrics, Strategy
from wire.errors import AdmissionError, RunError, StillhouseError, StorageError
from wire.messages import Order, Result
from wire.storage import Patience

log = logging.getLogger("orchestrator")


class Admitted(NamedTuple):
    """A result was looked over; `fault` says why it is refused."""

    result: Result
    fault: StillhouseError | None


class Aggregated(NamedTuple):
    """A round is in the model."""

    state: LearntState
    metrics: Metrics


class Failed(NamedTuple):
    """The worker met an error that is ours, not a device's."""

    fault: BaseException


Outcome = Admitted | Aggregated | Failed


class Worker:
    """Does one thing after the other; what comes of each goes to `emit`, in its thread.

    Args:
        strategy: the algorithm.
        patience: waits where the disk is full.
        emit: is given each outcome.
    """

    def __init__(
        self, strategy: Strategy, patience: Patience, emit: Callable[[Outcome], None]
    ) -> None:
        self._contributions = Contributions(strategy, patience.attempt)
        self._emit = emit
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="work")

    def look_over(self, state: LearntState, order: Order, result: Result) -> None:
        """Check the result of an order, and keep what it adds; comes to Admitted."""
        self._submit(self._look_over, state, order, result)

    def aggregate(self, state: LearntState, attempt: Attempt, results: Sequence[Result]) -> None:
        """Take in a round's results; comes to Aggregated."""
        aggregate = self._contributions.aggregate
        self._submit(lambda: Aggregated(*aggregate(state, attempt.round, attempt.orders, results)))

    def forget(self, device: str) -> None:
        """Let go of what a device's result adds: it does not count."""
        self._threads.submit(self._contributions.forget, device)

    def clear(self) -> None:
        """Let go of what results add to a round that was given up."""
        self._threads.submit(self._contributions.clear)

    def end(self, *, wait: bool) -> None:
        """Begin nothing more, and wait for what is under way."""
        self._threads.shutdown(wait=wait, cancel_futures=True)

    def _look_over(self, state: LearntState, order: Order, result: Result) -> Outcome:
        try:
            self._contributions.admit(state, order, result)
        except (StorageError, RunError, OSError, MemoryError):  # those are ours
            raise
        except StillhouseError as fault:
            return Admitted(result, fault)
        except Exception as fault:  # whatever a payload provokes, it ends that result, not the run
            log.exception("%s: its result cannot be looked over", result.device)
            return Admitted(result, AdmissionError(f"it cannot be read: {fault!r}"))
        return Admitted(result, None)

    def _submit(self, work: Callable[..., Outcome], *arguments: Any) -> None:
        def done(future: Future[Outcome]) -> None:
            if future.cancelled():
                return
            fault = future.exception()
            self._emit(Failed(fault) if fault else future.result())

        self._threads.submit(work, *arguments).add_done_callback(done)
