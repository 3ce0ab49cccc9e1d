"""A lock file that one process holds at a time; the system lets go of it when the process ends."""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def hold(path: Path, who: str) -> TextIO | None:
    """Take a lock, until the file returned is closed; None where another process has it.

    Args:
        path: of the lock file; it is made, and stays where it could be taken.
        who: what `holder` tells others.

    Raises:
        OSError: the file cannot be made or locked.
    """
    made = not path.exists()
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(who)
        file.flush()
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        if made:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # what was to be written is tried once more
            file.close()
        raise
    return file


def holder(path: Path) -> str:
    """Who holds a lock, as it said; "" where that cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
