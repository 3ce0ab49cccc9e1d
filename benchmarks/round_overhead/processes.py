"""A contender's processes: each writes its own log, and all are ended with the turn."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.race import ContenderError

STOP_S = 10.0
LIMIT_S = 300.0  # to start, or for one round


class Processes:
    """Starts processes in a folder; leaving its context ends them and what they started."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._environment = {**os.environ, **environment}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str]) -> int:
        """Start a command in a new process group; return its process id."""
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )
        self._running[name] = process
        return process.pid

    def wait(self, what: str, holds: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
        """Wait until `holds` returns true.

        Raises:
            ContenderError: a process failed, or the time is over; quotes the last line it wrote.
        """
        deadline = time.monotonic() + limit_s
        while True:
            is_there = holds()
            self.check()
            if is_there:
                return
            if time.monotonic() > deadline:
                ends = "; ".join(f"{name}: {self.end(name)}" for name in self._running)
                raise ContenderError(f"no {what} within {limit_s:g} s; {ends}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raise ContenderError if a process failed; quotes the last line it wrote."""
        for name, process in self._running.items():
            if process.poll():
                raise ContenderError(f"{name} ended with {process.returncode}: {self.end(name)}")

    def says(self, name: str, text: str) -> int:
        """How many times a process has written `text` so far."""
        return (self.folder / f"{name}.log").read_bytes().count(text.encode())

    def end(self, name: str) -> str:
        """The last line that a process wrote."""
        output = (self.folder / f"{name}.log").read_text(errors="replace").strip()
        return output.splitlines()[-1] if output else "it said nothing"

    def ended(self, name: str) -> bool:
        """Whether a process has ended."""
        return self._running[name].poll() is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for process in reversed(self._running.values()):
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
