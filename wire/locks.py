"""A lock file that one process holds at a time; the system releases it when the process ends."""

import fcntl
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def hold(path: Path, who: str) -> TextIO | None:
    """Take a lock and hold it until the returned file is closed; None if another process has it.

    Args:
        path: the lock file. It is created, and stays after the lock is released.
        who: the text that `holder` returns to others.

    Raises:
        OSError: the file cannot be created or locked.
    """
    is_new = not path.exists()
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
        if is_new:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # closing tries once more to write the text
            file.close()
        raise
    return file


def holder(path: Path) -> str:
    """The text that a lock's holder gave `hold`; "" if it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
