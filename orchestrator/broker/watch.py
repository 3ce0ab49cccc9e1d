"""Watching a file that another process replaces."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

LOOK_S = 0.5


async def replaced(path: Path) -> AsyncIterator[None]:
    """Yields once each time the file is found replaced; it looks every `LOOK_S` seconds."""
    before = _identity(path)
    while True:
        await asyncio.sleep(LOOK_S)
        now = _identity(path)
        if now is not None and now != before:
            before = now
            yield


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
