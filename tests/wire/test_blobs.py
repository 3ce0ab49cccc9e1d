"""Blobs are pulled in any order, resumed after any fault, and accepted only by their digest."""

import resource
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from wire.blobs import BlobStore, Fetch
from wire.errors import TransferError
from wire.messages import BlobRef, Chunk, Gone, Want

DATA = np.random.default_rng(0).bytes(10_500)


@pytest.fixture
def sender(tmp_path):
    return BlobStore(tmp_path / "sender", chunk_bytes=1024)


@pytest.fixture
def receiver(tmp_path):
    return BlobStore(tmp_path / "receiver", chunk_bytes=1024)


def names(store: BlobStore):
    return [path.name for path in store.folder.iterdir()]


def answers(store: BlobStore, want: Want):
    got = []
    store.answer(want, lambda message, body: got.append((message, memoryview(body))))
    return got


def pull(sender: BlobStore, fetch: Fetch, *, stop_after=10**9) -> int:
    """Serve chunks until the fetch is done; return how many were sent."""
    sent, now = 0, 0.0
    while not fetch.done and sent < stop_after:
        now += 1
        want = fetch.wants(now)
        for message, body in answers(sender, want) if want else ():
            fetch.chunk(message, body)
            sent += 1
    return sent


def test_a_blob_arrives_whole(sender, receiver):
    ref = sender.put(DATA)
    assert (ref.size, ref.chunks) == (len(DATA), 11)
    assert pull(sender, Fetch(receiver, ref)) == 11
    assert receiver.path(ref.digest).read_bytes() == DATA
    assert names(receiver) == [ref.digest]


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025])
def test_odd_sizes_arrive(sender, receiver, size):
    ref = sender.put(DATA[:size])
    pull(sender, Fetch(receiver, ref))
    assert receiver.path(ref.digest).read_bytes() == DATA[:size]


def test_a_restarted_receiver_asks_only_for_what_is_missing(sender, receiver):
    ref = sender.put(DATA)
    assert pull(sender, Fetch(receiver, ref, window=2), stop_after=6) == 6
    again = Fetch(BlobStore(receiver.folder, 1024), ref)
    assert again.received == 6 * 1024
    assert pull(sender, again) == 5
    assert receiver.path(ref.digest).read_bytes() == DATA


def test_the_window_bounds_what_is_under_way(sender, receiver):
    fetch = Fetch(receiver, sender.put(DATA), window=4)
    assert len(fetch.wants(0.0).chunks) == 4
    assert fetch.wants(0.1) is None
    assert fetch.in_flight == 4


def test_a_lost_chunk_is_asked_for_again(sender, receiver):
    fetch = Fetch(receiver, sender.put(DATA), window=2, retry_s=10)
    first = fetch.wants(0.0)
    assert fetch.wants(9.9) is None
    assert fetch.wants(10.1).chunks == first.chunks
    fetch.forget_asked()
    assert fetch.wants(10.2).chunks == first.chunks


def test_chunks_that_come_twice_or_late_do_no_harm(sender, receiver):
    ref = sender.put(DATA)
    fetch = Fetch(receiver, ref)
    every = answers(sender, Want(ref.digest, 1024, tuple(range(11))))
    for message, body in reversed(every + every):
        fetch.chunk(message, body)
    assert receiver.path(ref.digest).read_bytes() == DATA


def test_a_chunk_that_comes_again_with_other_bytes_changes_nothing(sender, receiver):
    ref = sender.put(DATA)
    fetch = Fetch(receiver, ref)
    *most, last = answers(sender, Want(ref.digest, 1024, tuple(range(11))))
    for message, body in most:
        fetch.chunk(message, body)
    fetch.chunk(Chunk(ref.digest, 3), memoryview(bytes(1024)))
    fetch.chunk(*last)
    assert receiver.path(ref.digest).read_bytes() == DATA


def test_a_question_is_asked_when_half_the_window_is_free(sender, receiver):
    fetch = Fetch(receiver, sender.put(DATA), window=6)
    every = answers(sender, fetch.wants(0.0))
    for message, body in every[:2]:
        fetch.chunk(message, body)
        assert fetch.wants(0.1) is None
    fetch.chunk(*every[2])
    assert fetch.wants(0.1).chunks == (6, 7, 8)


def test_the_least_budget_that_transfers_may_share_is_enough(sender, receiver):
    fetch = Fetch(receiver, sender.put(DATA), window=8)
    for now in range(10):
        want = fetch.wants(float(now), room=2)
        for message, body in answers(sender, want) if want else ():
            fetch.chunk(message, body)
    assert fetch.done


@pytest.mark.parametrize(("index", "size"), [(11, 1024), (-1, 1024), (0, 1023), (10, 1024)])
def test_a_chunk_of_wrong_number_or_length_is_refused(sender, receiver, index, size):
    ref = sender.put(DATA)
    with pytest.raises(TransferError, match="chunk"):
        Fetch(receiver, ref).chunk(Chunk(ref.digest, index), memoryview(bytes(size)))


def test_a_corrupt_chunk_fails_the_digest_and_all_is_pulled_again_once(sender, receiver):
    ref = sender.put(DATA)
    fetch = Fetch(receiver, ref, window=64)

    def pull_with_a_corrupt_chunk():
        first, *rest = answers(sender, fetch.wants(0.0))
        for message, body in rest:
            fetch.chunk(message, body)
        fetch.chunk(first[0], memoryview(bytes(1024)))

    pull_with_a_corrupt_chunk()
    assert not receiver.has(ref.digest)
    assert fetch.received == 0
    with pytest.raises(TransferError, match="expected SHA-256"):
        pull_with_a_corrupt_chunk()
    assert pull(sender, fetch) == 11
    assert receiver.has(ref.digest)


def test_a_window_of_one_chunk_is_enough(sender, receiver):
    assert pull(sender, Fetch(receiver, sender.put(DATA), window=1)) == 11


def test_a_declared_terabyte_takes_no_disk(receiver):
    Fetch(receiver, BlobRef("ab" * 32, 1 << 34, 1 << 19))
    used = sum(p.stat().st_blocks * 512 for p in receiver.folder.iterdir())
    assert used < 1 << 20


def test_a_blob_larger_than_files_may_be_here_is_its_senders_fault(receiver):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(TransferError, match=f"{1 << 30} bytes are more than a file may have"):
            Fetch(receiver, BlobRef("ab" * 32, 1 << 30, 1 << 19))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_blob_that_is_gone_says_so(sender, receiver):
    ref = BlobRef("00" * 32, 5000, 1024)
    fetch = Fetch(receiver, ref)
    ((message, _),) = answers(sender, fetch.wants(0.0))
    assert isinstance(message, Gone)
    with pytest.raises(TransferError, match="no longer has it"):
        fetch.gone()


def test_one_blob_from_two_senders_arrives_once_and_neither_can_spoil_the_other(sender, receiver):
    ref = sender.put(DATA)
    good, bad = Fetch(receiver, ref, owner="a", window=64), Fetch(receiver, ref, owner="b")
    every = answers(sender, good.wants(0.0))
    bad.chunk(every[0][0], memoryview(bytes(1024)))
    for message, body in every:
        good.chunk(message, body)
    assert good.done
    assert bad.wants(1.0) is None
    assert bad.done
    bad.chunk(*every[5])
    assert names(receiver) == [ref.digest]


def test_a_failed_write_leaves_nothing(sender):
    def write_and_fail():
        with sender.create() as sink:
            sink.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert names(sender) == []


class LimitedBroker:
    """A broker that silently drops large messages, as with Mosquitto's `message_size_limit`."""

    def __init__(self, sender: BlobStore, limit: int) -> None:
        self.sender, self.limit = sender, limit
        self.sender_is_there = True

    def turns(self, fetch: Fetch, times: Iterable[float], *, cut: bool = False) -> None:
        """Pass requests and answers; with `cut`, the connection ends after each turn."""
        for now in times:
            self.turn(fetch, now)
            if cut:
                fetch.forget_asked()

    def turn(self, fetch: Fetch, now: float) -> None:
        want = fetch.wants(now)
        for message, body in answers(self.sender, want) if want and self.sender_is_there else ():
            if len(body) <= self.limit:
                fetch.chunk(message, body)


def test_chunks_that_a_broker_drops_are_told_with_their_size_and_the_remedy(sender, tmp_path):
    ref = BlobStore(tmp_path / "sender", chunk_bytes=8192).put(DATA)
    fetch = Fetch(BlobStore(tmp_path / "receiver"), ref, retry_s=10, settings="agent.toml of pi")
    broker = LimitedBroker(sender, limit=5000)
    with pytest.raises(TransferError, match="chunks of 8,192 bytes do not come") as caught:
        broker.turns(fetch, [11.0 * turn for turn in range(12)])  # longer than `retry_s` each
    assert "smaller chunk_bytes in agent.toml of pi (1024, say)" in str(caught.value)
    assert "max_packet_size, message_size_limit" in str(caught.value)
    smaller = replace(ref, chunk_bytes=4096)
    again = Fetch(BlobStore(tmp_path / "receiver"), smaller)
    broker.turns(again, range(20))
    assert again.done


def test_a_sender_that_is_away_for_long_is_waited_for(sender, receiver):
    ref = replace(sender.put(DATA), chunk_bytes=2048)
    fetch = Fetch(receiver, ref, retry_s=10)
    broker = LimitedBroker(sender, limit=10**6)
    broker.sender_is_there = False
    broker.turns(fetch, [11.0 * turn for turn in range(1000)])
    broker.sender_is_there = True
    fetch.forget_asked()  # the sender has reconnected
    broker.turns(fetch, range(11_000, 11_010))
    assert fetch.done


def test_a_broker_that_ends_the_connection_at_each_large_message_is_told_as_well(sender, receiver):
    """So does Mosquitto's `max_packet_size`; all chunks are then requested again each time."""
    ref = replace(sender.put(DATA), chunk_bytes=8192)
    fetch = Fetch(receiver, ref, retry_s=1000)
    broker = LimitedBroker(sender, limit=5000)
    with pytest.raises(TransferError, match="chunks of 8,192 bytes do not come"):
        broker.turns(fetch, range(12), cut=True)


def test_a_last_chunk_that_is_lost_again_and_again_does_not_mean_that_chunks_are_too_large(
    sender, receiver
):
    ref = replace(sender.put(DATA), chunk_bytes=2048)
    fetch = Fetch(receiver, ref, retry_s=10)
    for turn in range(30):
        want = fetch.wants(11.0 * turn)
        assert want is None or want.chunk_bytes == 2048
        for message, body in answers(sender, want) if want else ():
            if message.index != 3:
                fetch.chunk(message, body)
    assert not fetch.done
