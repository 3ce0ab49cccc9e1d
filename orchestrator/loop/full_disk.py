"""A full disk while results come in: what it has no room for is dropped, and comes again."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from wire import storage
from wire.errors import StalledError
from wire.storage import Patience

STALLED_S = 60.0  # twice the time after which a device offers its result again (`resend_s`)
_KEY = "intake"


class FullDisk:
    """Tracks a full disk while results come in.

    A chunk that finds no room is asked for again, and a result whose verdict finds no room is
    offered again. Meanwhile the open round's deadline waits.

    Args:
        patience: tells people that the disk is full, and when it no longer is.
        folder: where the results are written.
    """

    def __init__(self, patience: Patience, folder: Path) -> None:
        self._patience, self._folder = patience, folder
        self._met_s = -math.inf  # when the disk was last found full
        self._ticked_s = time.monotonic()

    def takes(self, work: Callable[[], None]) -> bool:
        """Do `work`; returns whether there was room for it.

        Raises:
            StorageError: the disk or the system fails: every OSError is a fault of ours.
        """
        try:
            with storage.at(self._folder):
                work()
        except OSError as fault:
            raise storage.as_error(fault, self._folder) from fault
        except StalledError as fault:
            self._met_s = time.monotonic()
            self._patience.met(fault, _KEY)
            return False
        return True

    def over(self) -> None:
        """Note that part of a result was written."""
        self._patience.over(_KEY)

    def delay(self, now_s: float) -> float:
        """How many seconds to put off the round's deadline: those since the last call, or 0."""
        passed_s, self._ticked_s = now_s - self._ticked_s, now_s
        return passed_s if now_s - self._met_s < STALLED_S else 0.0
