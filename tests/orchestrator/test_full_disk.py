"""The disk is full while results come in: they are pulled again, and the round waits for them."""

import time

import pytest

from orchestrator.loop.full_disk import STALLED_S, FullDisk
from wire.errors import StalledError, StorageError
from wire.storage import Patience


def failing(fault: Exception):
    def work() -> None:
        raise fault

    return work


def test_what_finds_no_room_is_left_and_the_deadline_waits_until_well_after():
    patience = Patience()
    disk, now = FullDisk(patience), time.monotonic()
    disk.delay(now)
    assert disk.delay(now + 1) == 0.0
    assert not disk.takes(failing(StalledError("the disk is full")))
    assert patience.waiting
    assert disk.delay(now + 11) == 10.0
    assert disk.takes(lambda: None)
    assert patience.waiting, "what found no room has not come again yet"
    disk.over()
    assert not patience.waiting
    assert disk.delay(now + 3 * STALLED_S) == 0.0


def test_a_disk_that_fails_is_not_waited_for():
    with pytest.raises(StorageError):
        FullDisk(Patience()).takes(failing(StorageError("the disk fails")))
