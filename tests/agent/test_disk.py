"""What an agent does when its disk is damaged, full, read-only or somebody else's."""

import contextlib
import os
import shutil
import sqlite3
from dataclasses import replace

import pytest

from edge_agent.agent import Agent
from edge_agent.journal import Journal
from edge_agent.rounds import Phase, RoundState
from edge_agent.worker import Ended
from ondevice.config import AgentConfig
from ondevice.work import CancelledError
from tests.conftest import Disk
from wire import storage
from wire.address import BrokerAddress
from wire.blobs import BlobStore, Fetch
from wire.errors import StalledError, StorageError
from wire.link import Arrived
from wire.messages import BlobRef, Order, Result
from wire.storage import Patience

REF = BlobRef("ab" * 32, 1000, 1024)
ORDER = Order("run", 3, 1, REF, 1, 0.1, 7, {"features": "float32"})
RESULT = Result("pi", "run", 3, 1, 10, blobs={"features": REF}, metrics={"train_s": 1.0})


def overwritten(path):
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // 4096):
            file.seek(4096 * page)
            file.write(os.urandom(2000))


def a_bit(path):
    """Flip one bit of a journalled order; SQLite does not notice it."""
    content = bytearray(path.read_bytes())
    content[content.rfind(b"sequence")] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "pages overwritten": overwritten,
    "a bit of an order": a_bit,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 5000),
    "cut in its header": lambda path: os.truncate(path, 50),
    "no bytes": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
    "a text": lambda path: path.write_text("not a journal at all\n" * 1000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_set_aside_and_begun_anew(tmp_path, damage, caplog):
    path = tmp_path / "journal.db"
    with contextlib.closing(Journal(path)) as journal:
        journal.accept(ORDER)
        journal.finish(ORDER, RESULT, "weights-run-3.safetensors")
    for sequence in (2, 3):
        (tmp_path / f"weights-run-{sequence}.safetensors").write_bytes(b"")
    DAMAGE[damage](path)
    with contextlib.closing(Journal(path)) as journal:
        assert journal.latest() is None
        assert journal.weights_files().get("run") == "weights-run-3.safetensors"
        journal.accept(ORDER)
    with contextlib.closing(Journal(path)) as journal:
        assert journal.latest() == (ORDER, None, False)
    if damage not in ("no bytes", "gone"):
        assert (tmp_path / "journal.db.damaged-1").exists()
        assert "set aside as journal.db.damaged-1" in caplog.text


def test_a_journal_that_is_damaged_while_it_is_open_goes_on_with_what_is_asked(tmp_path):
    path = tmp_path / "journal.db"
    with contextlib.closing(Journal(path)) as journal:
        journal.accept(ORDER)
        path.with_name("journal.db-wal").write_bytes(b"")
        path.write_text("not a journal at all\n" * 1000)
        journal.finish(ORDER, RESULT, None)
        assert journal.latest() == (ORDER, RESULT, False)


@pytest.mark.parametrize("journal", ["new", "old"])
def test_an_agent_that_finds_the_disk_full_anywhere_lets_go_of_its_folder(disk, digits, journal):
    """The disk has one page more each time: for the lock, the journal's files, its schema, ..."""
    address = BrokerAddress("mqtt://127.0.0.1:9")
    config = AgentConfig("pi", "fleet", digits / "device-0.npz", disk.path / "state", address)
    Agent(config)._folder.close()
    met = []
    for pages in range(32):
        if journal == "new":
            shutil.rmtree(config.state)
        disk.fill(leave=4096 * pages)
        try:
            Agent(config)._folder.close()
        except StalledError as fault:
            met.append(fault)  # keeps the traceback, so that nothing is garbage-collected
        disk.make_room()
        Agent(config)._folder.close()
    assert met


@pytest.fixture
def agent(tmp_path, digits):
    address = BrokerAddress("mqtt://127.0.0.1:9")
    agent = Agent(AgentConfig("pi", "fleet", digits / "device-0.npz", tmp_path / "state", address))
    yield agent
    agent._folder.close()


def test_what_is_sent_again_while_the_disk_is_full_waits_once(agent, monkeypatch):
    def full(_event):
        raise StalledError("the disk is full")

    monkeypatch.setattr(agent, "_handle", full)
    for _ in range(3):
        agent._take(Arrived("a/receipt", b"for result 3"))
        agent._take(Arrived("a/receipt", b"for result 4"))
    assert [event.payload for event in agent._put_off] == [b"for result 3", b"for result 4"]


def test_an_order_that_comes_again_after_it_was_cancelled_does_not_fail(agent):
    agent._state = RoundState(Phase.FETCHING, ORDER)
    agent.journal.accept(ORDER)
    agent._take(Ended(ORDER, CancelledError("a newer order replaced this one")))
    assert agent.journal.latest() == (ORDER, None, False)


@pytest.mark.parametrize("anew", [False, True])
def test_a_state_folder_that_is_removed_under_the_agent_ends_it_with_a_word(tmp_path, digits, anew):
    address = BrokerAddress("mqtt://127.0.0.1:9")
    config = AgentConfig("pi", "fleet", digits / "device-0.npz", tmp_path / "state", address)
    agent = Agent(config)
    shutil.rmtree(config.state)
    if anew:
        config.state.mkdir()
    with pytest.raises(StorageError, match=f"{config.state} is gone: it was removed while"):
        agent.run()


def test_no_more_than_some_damaged_journals_are_kept(tmp_path):
    path = tmp_path / "journal.db"
    for _ in range(storage.SET_ASIDE + 2):
        path.write_text("not a journal at all\n" * 1000)
        Journal(path).close()
    assert len(list(tmp_path.glob("*.damaged-?"))) == storage.SET_ASIDE


def test_a_journal_that_another_program_holds_is_said_with_its_name(tmp_path, monkeypatch):
    path = tmp_path / "journal.db"
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{**k, "timeout": 0.1}))
    with contextlib.closing(Journal(path)) as journal:
        with contextlib.closing(connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StalledError, match=r"journal\.db is held by"):
                journal.accept(ORDER)
        journal.accept(ORDER)


def test_a_folder_in_place_of_a_journal_is_named(tmp_path):
    (tmp_path / "journal.db").mkdir()
    with pytest.raises(StorageError, match="expected a journal, got a folder"):
        Journal(tmp_path / "journal.db")


def test_a_full_disk_is_named_with_its_path_and_nothing_is_half_written(disk: Disk):
    journal = Journal(disk.path / "journal.db")
    disk.fill()
    large = Result("pi", "run", 3, 1, 10, fault="x" * 2000)

    def finish_many() -> None:
        for sequence in range(4, 4000):  # the journal's own file has some free room
            journal.finish(replace(ORDER, sequence=sequence), large, None)

    with pytest.raises(StalledError, match=rf"the disk is full at {disk.path}.*bytes are free"):
        finish_many()
    disk.make_room()
    journal.accept(ORDER)
    assert journal.latest() == (ORDER, None, False)
    journal.close()


def test_a_read_only_file_system_is_named_with_its_remedy(disk: Disk):
    Journal(disk.path / "journal.db").close()
    disk.read_only()
    with pytest.raises(StorageError, match="file system is read-only; mount it for writing"):
        Journal(disk.path / "journal.db")


def test_a_blob_goes_on_where_the_disk_was_full(disk: Disk):
    said, content = [], os.urandom(4 << 20)

    def pause(_seconds: float) -> bool:
        (partial,) = (disk.path / "blobs").iterdir()
        assert partial.stat().st_size > 0
        disk.make_room()
        return False

    blobs = BlobStore(disk.path / "blobs", patience=Patience(said.append, pause))
    (disk.path / "fill").write_bytes(bytes(6 << 20))
    ref = blobs.put(content)
    assert blobs.path(ref.digest).read_bytes() == content
    assert [bool(text) for text in said] == [True, False]
    assert f"the disk is full at {disk.path}/blobs" in said[0]


def test_a_transfer_goes_on_where_the_disk_was_full(disk: Disk):
    source = BlobStore(disk.path.parent / "source", 1 << 19)
    ref = source.put(os.urandom(4 << 20))
    fetch = Fetch(BlobStore(disk.path / "blobs"), ref, window=8)
    disk.fill()
    sent = []
    source.answer(fetch.wants(0.0), lambda *answer: sent.append(answer))
    with pytest.raises(StalledError):
        fetch.chunk(sent[0][0], memoryview(sent[0][1]))
    disk.make_room()
    for chunk, body in sent:
        fetch.chunk(chunk, memoryview(body))
    assert fetch.done
