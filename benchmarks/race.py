"""Lets contenders take turns, each in a process.

A shared machine is sometimes fast, sometimes slow. So all contenders are alive at once; one of them
runs, for about a second, while the others wait on their pipes. The order changes from round to
round, so that none always follows the same other. A slow moment then hits all alike, and ratios are
taken within a round.
"""

import contextlib
import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wire.errors import StillhouseError

# Our packages come first, whatever the current folder; a user's own network may come after.
_PLACES = (str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", ""))
PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, _PLACES)), "PYTHONSAFEPATH": "1"}
LIMIT_S = 900.0  # for preparation, and beyond a turn's length; torch.compile may take minutes


class ContenderError(StillhouseError):
    """A contender cannot be made ready or does not finish."""


@dataclass(frozen=True)
class Entry:
    """A contender: its command (without Python and the number of threads), and a note about it."""

    name: str
    command: Sequence[str]
    note: str = ""
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Course:
    """What one contender did: a measurement a round, or why it stopped."""

    entry: Entry
    loss: float | None = None
    turns: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failed: str = ""


class Worker:
    """A contender's process."""

    def __init__(self, entry: Entry, threads: int, log: Path) -> None:
        self.peak_bytes = 0
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [entry.python, "-m", *entry.command, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **PATHS, "OMP_NUM_THREADS": str(threads), **entry.environment},
                text=True,
            )

    def ready(self) -> float | None:
        """Wait until it is prepared; return the loss of its first step.

        Raises:
            ContenderError: it cannot be prepared.
        """
        loss: float | None = self._answer(LIMIT_S)["loss"]
        return loss

    def turn(self, seconds: float) -> float:
        """Let it run; return what it measured.

        Raises:
            ContenderError: it failed.
        """
        assert self._process.stdin is not None  # noqa: S101 - a pipe, as asked for above
        with contextlib.suppress(BrokenPipeError):  # it has ended: _answer says so
            print(seconds, file=self._process.stdin, flush=True)
        (value,) = self._answer(LIMIT_S + seconds).values()
        return float(value)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self, limit_s: float) -> dict[str, Any]:
        pipe = self._process.stdout
        assert pipe is not None  # noqa: S101 - a pipe, as asked for above
        if not select.select([pipe], [], [], limit_s)[0]:
            raise ContenderError(f"no answer within {limit_s:g} s")
        line = pipe.readline()
        if not line:
            output = self._log.read_text(errors="replace").strip() or "nothing"
            raise ContenderError(
                f"ended with {self._process.wait()}, having said: {output.splitlines()[-1]}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise ContenderError(answer["failed"])
        self.peak_bytes = max(self.peak_bytes, _peak(self._process.pid))
        return answer


def run(
    entries: Sequence[Entry],
    *,
    threads: int,
    rounds: int,
    seconds: float,
    logs: Path,
    say: Callable[[str], None],
) -> list[Course]:
    """Let contenders take turns; if one fails, the others go on without it."""
    courses = [Course(entry) for entry in entries]
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for course in courses:
            name = course.entry.name
            say(f"{name}: getting ready")
            worker = Worker(course.entry, threads, logs / f"{name}-{threads}.log")
            stack.callback(worker.close)
            with _leaving(course):
                course.loss = worker.ready()
                workers[name] = worker
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for course in random.Random(number).sample(courses, len(courses)):
                if course.failed:
                    continue
                worker = workers[course.entry.name]
                with _leaving(course):
                    course.turns.append(worker.turn(seconds))
                    course.peak_bytes = worker.peak_bytes
    return courses


@contextlib.contextmanager
def _leaving(course: Course) -> Iterator[None]:
    try:
        yield
    except ContenderError as fault:
        course.failed = str(fault)


def _peak(pid: int) -> int:
    """VmHWM, the peak of a process's resident memory; 0 without a procfs."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
