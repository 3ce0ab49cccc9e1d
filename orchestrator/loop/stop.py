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


class Stopped(NamedTuple):
    """Event: a person or the system asks us to end."""


def check(cause: BaseException | None = None) -> None:
    """Return, unless the run is to end.

    Raises:
        Interrupted: the run is to end.
    """
    if stopping.asked.is_set():
        raise Interrupted from cause


@contextmanager
def heard(say: Callable[[], str], emit: Callable[[Stopped], None]) -> Iterator[None]:
    """Answer Ctrl-C within the block, which calls `check` whenever nothing is lost by an end.

    Args:
        say: returns the answer.
        emit: takes `Stopped`, which wakes the loop.

    Raises:
        Interrupted: the run was to end while the disk was full.
    """
    with stopping.instead(say, lambda: emit(Stopped())):
        try:
            yield
        except StalledError as fault:
            check(fault)
            raise


def answer(now: OpenRound, report: Report, again: str | None, *, waiting: bool) -> str:
    """The answer to Ctrl-C: what is kept, and how to resume the run.

    Args:
        now: the open round.
        report: of the run.
        again: the command that resumes the run; None: this process's.
        waiting: whether something waits for a full disk.
    """
    done = len(now.attempt.verdicts)
    more = f"{done} results of round {now.state.round}" if done else "no result of the next"
    if waiting:
        more += "; what the disk had no room for is done again"
    elif now.state.phase is Phase.AGGREGATING:
        more += ", which is aggregated first. Ended before that, it is aggregated again"
    return said(report, more, again)
