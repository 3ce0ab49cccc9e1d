"""Watching files that another process replaces."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

LOOK_S = 0.5


async def replaced(*paths: Path) -> AsyncIterator[None]:
    """Yields each time files are found replaced; it looks every `LOOK_S` seconds."""
    before = [_identity(path) for path in paths]
    while True:
        await asyncio.sleep(LOOK_S)
        now = [_identity(path) or old for path, old in zip(paths, before, strict=True)]
        if now != before:
            before = now
            yield


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns
