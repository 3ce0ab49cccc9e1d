"""Incoming results share one budget, which no device can hold for itself."""

import errno
import hashlib
import os
from contextlib import suppress
from dataclasses import replace

import pytest

from orchestrator.loop.intake import MUTE, Intake
from wire.blobs import BlobStore
from wire.errors import StalledError, TransferError
from wire.messages import BlobRef, Chunk, Result, Want

CHUNK = 1024
DATA = bytes(range(256)) * 4 * 52


def result(device: str, data: bytes) -> Result:
    ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data), CHUNK)
    return Result(device, "run", 1, 1, 10, blobs={"update": ref})


def failing(fault: Exception):
    def work(*_) -> None:
        raise fault

    return work


def pulled(intake: Intake, device: str, until_s: float, live: frozenset[str]) -> float | None:
    """The time when all chunks of `device` have come, if only it answers, and does so at once."""
    for quarter in range(int(4 * until_s)):
        for asked, want in list(intake.wants(quarter / 4, live)):
            if asked == device:
                for index in want.chunks:
                    piece = memoryview(DATA)[index * CHUNK : (index + 1) * CHUNK]
                    intake.take(device, Chunk(want.digest, index), piece)
        if [done.device for done in intake.complete()] == [device]:
            return quarter / 4
    return None


@pytest.mark.parametrize(("budget", "silent"), [(32, 0), (32, 4), (32, 40), (8, 1), (4, 7)])
def test_silent_devices_hold_the_budget_no_longer_than_an_answer_may_take(tmp_path, budget, silent):
    intake = Intake(BlobStore(tmp_path, CHUNK), budget)
    names = [f"silent-{i}" for i in range(silent)]
    for name in names:
        intake.begin(result(name, name.encode() * 4000))
    intake.begin(result("honest", DATA))
    turns = -(-8 * silent // budget)  # until all silent devices were asked once
    done = pulled(intake, "honest", 600.0, frozenset({*names, "honest"}))
    assert done is not None
    assert done < 15.5 * turns + 60


def test_a_device_that_answers_again_is_asked_like_the_others(tmp_path):
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    intake.begin(result("late", DATA))
    live = frozenset({"late"})
    assert [device for device, _ in intake.wants(0.0, live)] == ["late"]
    assert [device for device, _ in intake.wants(16.0, live)] == ["late"], "it is asked once more"
    assert pulled(intake, "late", 60.0, live) is not None


def test_a_connected_device_that_sends_nothing_of_its_result_does_not_hold_the_round(tmp_path):
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    intake.begin(result("mute", DATA))
    live, faults = frozenset({"mute"}), []
    stray = Chunk("ab" * 32, 0), memoryview(b"stray")
    for second in range(18 * MUTE):
        intake.take("mute", *stray)
        faults += [(second, each) for _, each in intake.wants(second, live)
                   if isinstance(each, TransferError)]  # fmt: skip
        if faults:
            break
    ((second, fault),) = faults
    assert 15 * MUTE <= second < 17 * MUTE, "a chunk of something else is no answer"
    told = f"mute is connected, was asked {MUTE} times, and sent nothing"
    assert str(fault) == told


@pytest.mark.parametrize("back", ["chunk", "resume", "full disk"])
def test_a_slow_device_that_sends_at_last_is_not_refused(tmp_path, monkeypatch, back):
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    offered = result("slow", DATA)
    intake.begin(offered)
    live, wants, late_s = frozenset({"slow"}), 0, 15 * MUTE - 5
    for second in range(3 * late_s + 3):
        for _, want in intake.wants(second, live):
            assert isinstance(want, Want)
            wants += 1
        if second % late_s == late_s - 1:
            index = second // late_s
            piece = memoryview(DATA)[index * CHUNK : (index + 1) * CHUNK]
            if back == "chunk":
                intake.take("slow", Chunk(offered.blobs["update"].digest, index), piece)
            elif back == "resume":
                intake.resume("slow")
            else:
                with monkeypatch.context() as patch:
                    patch.setattr("wire.blobs._write_at", failing(StalledError("full")))
                    with pytest.raises(StalledError):
                        intake.take("slow", Chunk(offered.blobs["update"].digest, index), piece)
    assert wants > 3 * 3


def test_a_device_that_is_not_asked_again_is_not_mute(tmp_path):
    """Others use up the budget all the time."""
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    intake.begin(result("starved", DATA))
    live = frozenset({"starved"})
    assert [device for device, _ in intake.wants(0.0, live)] == ["starved"]
    for number in range(40):
        name = f"busy-{number}"
        intake.begin(result(name, name.encode() * 4000))
        live |= {name}
    for second in range(16, 300):
        for device, want in list(intake.wants(float(second), live)):
            assert isinstance(want, Want) or device != "starved"


def test_an_offer_of_the_same_blob_in_other_chunks_goes_on(tmp_path):
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    offered = result("a", DATA)
    intake.begin(offered)
    list(intake.wants(0.0, frozenset("a")))
    ref = offered.blobs["update"]
    intake.begin(replace(offered, blobs={"update": replace(ref, chunk_bytes=2 * CHUNK)}))
    ((_, want),) = intake.wants(1.0, frozenset("a"))
    for index in want.chunks:
        piece = memoryview(DATA)[2 * index * CHUNK : 2 * (index + 1) * CHUNK]
        assert intake.take("a", Chunk(ref.digest, index), piece)


def test_offers_that_replace_one_another_leave_nothing_on_the_disk(tmp_path):
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    for number in range(9):
        intake.begin(result("a", DATA + bytes([number])))
        list(intake.wants(float(number), frozenset("a")))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".have", ".part"]


def test_what_is_here_or_had_begun_to_come_as_the_round_closes_is_named(tmp_path):
    store = BlobStore(tmp_path, CHUNK)
    intake = Intake(store, 8)
    whole, begun = result("whole", DATA), result("begun", DATA[:-1])
    store.put(DATA)
    intake.begin(whole)
    intake.begin(begun)
    assert list(intake.complete()) == [whole]
    digests = {each.blobs["update"].digest for each in (whole, begun)}
    assert intake.clear() == digests, "a result under check is here, and there is no verdict yet"
    intake.checked("whole")
    assert intake.clear() == frozenset()


def test_a_blob_that_is_damaged_once_the_disk_has_room_is_its_devices_fault_alone(
    tmp_path, monkeypatch
):
    """All its chunks come twice, and both times they do not match the announced digest."""
    store = BlobStore(tmp_path, CHUNK)
    intake = Intake(store, 8)
    ref = BlobRef("ab" * 32, CHUNK, CHUNK)
    bad = Result("bad", "run", 1, 1, 10, blobs={"update": ref})
    live = frozenset({"bad", "good"})
    intake.begin(bad)
    for _ in range(2):
        assert [device for device, _ in intake.wants(0.0, live)] == ["bad"]
        with suppress(StalledError):
            intake.take("bad", Chunk(ref.digest, 0), memoryview(DATA)[:CHUNK])
        monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "no room")))
    monkeypatch.undo()
    intake.begin(result("good", DATA))
    (bad_device, fault), (good_device, want) = intake.wants(1.0, live)
    assert (bad_device, good_device) == ("bad", "good")
    assert isinstance(fault, TransferError)
    assert isinstance(want, Want)


def test_a_round_that_closes_while_devices_are_asked_ends_the_asking(tmp_path):
    intake = Intake(BlobStore(tmp_path, CHUNK), 100)
    for name in "ab":
        intake.begin(result(name, name.encode() * 4000))
    asking = intake.wants(0.0, frozenset("ab"))
    assert next(asking)[0] == "a"
    intake.clear()
    assert list(asking) == []


def test_only_a_chunk_that_is_written_shows_that_the_disk_has_room(tmp_path):
    intake = Intake(BlobStore(tmp_path, CHUNK), 8)
    offered = result("a", DATA)
    intake.begin(offered)
    chunk, body = Chunk(offered.blobs["update"].digest, 0), memoryview(DATA)[:CHUNK]
    assert intake.take("a", chunk, body)
    assert not intake.take("a", chunk, body), "it is here already"
    assert not intake.take("a", Chunk("ab" * 32, 0), body), "it is of no blob that is pulled"
    assert not intake.take("stranger", chunk, body)
