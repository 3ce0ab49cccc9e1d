"""The disk is full while results come in: they are pulled again, and the round waits for them."""

import errno
import os
import time

import pytest

from orchestrator.loop.full_disk import STALLED_S, FullDisk
from wire.errors import StalledError, StorageError
from wire.storage import Patience


def failing(fault: Exception):
    def work() -> None:
        raise fault

    return work


def test_what_finds_no_room_is_left_and_the_deadline_waits_until_well_after(tmp_path):
    patience = Patience()
    disk, now = FullDisk(patience, tmp_path), time.monotonic()
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


def test_a_disk_that_fails_is_not_waited_for(tmp_path):
    with pytest.raises(StorageError):
        FullDisk(Patience(), tmp_path).takes(failing(StorageError("the disk fails")))


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOENT, errno.ENAMETOOLONG])
def test_what_the_system_refuses_us_ends_the_run_with_a_reason(tmp_path, code):
    fault = OSError(code, os.strerror(code), str(tmp_path / "blobs" / "ab.pi.part"))
    with pytest.raises(StorageError, match="blobs"):
        FullDisk(Patience(), tmp_path).takes(failing(fault))


def test_a_disk_that_is_full_where_nobody_named_it_is_waited_for_too(tmp_path):
    assert not FullDisk(Patience(), tmp_path).takes(failing(OSError(errno.ENOSPC, "no room")))
