"""The files of a fleet, which several processes may change: a lock, and JSON tables."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wire import storage
from wire.errors import RunError


@contextlib.contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Hold the folder of all runs against other processes that would change a fleet.

    Not to be entered again inside: that waits for ever.
    """
    with storage.at(runs):
        runs.mkdir(parents=True, exist_ok=True)
        folder = os.open(runs, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read_table(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON table in a file of a fleet; empty if there is no file.

    Raises:
        RunError: the file is damaged; the message ends with the remedy.
    """
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as fault:
        raise RunError(f"{file}: not JSON: {fault}; {remedy}") from fault
    if not isinstance(content, dict):
        raise RunError(f"{file}: expected a table, got {type(content).__name__}; {remedy}")
    return content
