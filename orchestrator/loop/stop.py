"""How a run ends before it is finished: on Ctrl-C or SIGTERM, in good order."""

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
    """A person or the system asks us to end."""


class Stop:
    """Whether the run is to end.

    Args:
        report: of the run.
        patience: waits where the disk is full.
        emit: is given `Stopped`, which wakes the loop.
        again: the command that goes on with the run; None: this process's.

    Attributes:
        asked: a person or the system asked.
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
        """Go on, unless the run is to end.

        Raises:
            Interrupted: it is.
        """
        if self.asked:
            raise Interrupted from cause

    @contextmanager
    def heard(self, standing: Callable[[], OpenRound]) -> Iterator[None]:
        """Within the block, Ctrl-C is answered, and ends the run when nothing is lost by it.

        Args:
            standing: how the open round stands.

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
        """What Ctrl-C is answered: what is kept, and how to go on."""
        done = len(now.attempt.verdicts)
        more = f"{done} results of round {now.state.round}" if done else "no result of the next"
        if self._patience.waiting:
            more += "; what the disk had no room for is done again"
        elif now.state.phase is Phase.AGGREGATING:
            more += ", which is aggregated first. Ended before that, it is aggregated again"
        return said(self._report, more, self._again)
