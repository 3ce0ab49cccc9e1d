"""Ending a run early, on Ctrl-C or SIGTERM, without losing what was reached."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from orchestrator.display.report import Report, said
from orchestrator.rules.open_round import OpenRound
from orchestrator.rules.rounds import Phase
from wire import stopping
from wire.errors import StalledError
from wire.stopping import Interrupted
from wire.storage import Patience


class Stopped(NamedTuple):
    """Event: a person or the system asks us to end."""


class Stop:
    """Whether the run is to end.

    Args:
        report: of the run.
        patience: waits while the disk is full.
        emit: takes `Stopped`, which wakes the loop.
        again: the command that resumes the run; None: this process's.

    Attributes:
        asked: whether a person or the system asked for the end.
    """

    def __init__(
        self,
        report: Report,
        patience: Patience,
        emit: Callable[[Stopped], None],
        again: str | None,
    ) -> None:
        self.asked = False
        self._report, self._patience, self._emit, self._again = report, patience, emit, again

    def ask(self) -> None:
        """End the run soon."""
        self.asked = True
        self._emit(Stopped())

    def check(self, cause: BaseException | None = None) -> None:
        """Return, unless the run is to end.

        Raises:
            Interrupted: the run is to end.
        """
        if self.asked:
            raise Interrupted from cause

    @contextmanager
    def heard(self, standing: Callable[[], OpenRound]) -> Iterator[None]:
        """Answer Ctrl-C within the block, and end the run when nothing is lost by it.

        Args:
            standing: returns the open round.

        Raises:
            Interrupted: the run was to end while the disk was full.
        """
        with stopping.instead(lambda: self.answer(standing()), self.ask):
            try:
                yield
            except StalledError as fault:
                self.check(fault)
                raise

    def answer(self, now: OpenRound) -> str:
        """The answer to Ctrl-C: what is kept, and how to resume the run."""
        done = len(now.attempt.verdicts)
        more = f"{done} results of round {now.state.round}" if done else "no result of the next"
        if self._patience.waiting:
            more += "; what the disk had no room for is done again"
        elif now.state.phase is Phase.AGGREGATING:
            more += ", which is aggregated first. Ended before that, it is aggregated again"
        return said(self._report, more, self._again)
