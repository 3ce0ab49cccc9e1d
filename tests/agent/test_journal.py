"""The journal: what was committed survives kill -9."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_agent.journal import SESSIONS, Journal
from wire import frames, records
from wire.messages import BlobRef, Order, Result


@pytest.fixture
def journal_at(tmp_path):
    """Opens the same journal any number of times; all are closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(contextlib.closing(Journal(tmp_path / "journal.db")))


REF = BlobRef("ab" * 32, 1000, 1024)
ORDER = Order("run", 3, 1, REF, 1, 0.1, 7, {"features": "float32"})
RESULT = Result("pi", "run", 3, 1, 10, blobs={"features": REF}, metrics={"train_s": 1.0})
ROOT = Path(__file__).parents[2]


def test_order_result_and_receipt_are_restored(journal_at):
    journal = journal_at()
    assert journal.latest() is None
    journal.accept(ORDER)
    assert journal_at().latest() == (ORDER, None, False)
    journal.finish(ORDER, RESULT, "weights-3")
    again = journal_at()
    assert again.latest() == (ORDER, RESULT, False)
    assert again.weights_files().get("run") == "weights-3"
    journal.receipted("run", 3)
    assert again.latest() == (ORDER, RESULT, True)


def test_weights_of_a_run_are_kept_while_orders_come_and_go(journal_at):
    journal = journal_at()
    journal.accept(ORDER)
    journal.finish(ORDER, RESULT, "weights-3")
    other = Order("other", 1, 1, REF, 1, 0.1, 7, {})
    journal.accept(other)
    assert journal.latest() == (other, None, False)
    assert journal.weights_files().get("run") == "weights-3"
    assert journal.weights_files().get("other") is None
    assert journal.weights_files() == {"run": "weights-3"}


def test_an_order_that_a_newer_agent_accepted_does_not_stop_an_older_one(journal_at):
    journal = journal_at()
    journal.accept(ORDER)
    journal.finish(ORDER, RESULT, "weights-3")
    newer = frames.encode(frames.Kind.ORDER, {**records.plain(ORDER), "sketch": "dct"})
    with journal._db:
        journal._db.execute("UPDATE work SET work_order = ?", (newer,))
    again = journal_at()
    assert again.latest() is None
    assert again.weights_files().get("run") == "weights-3"
    again.accept(ORDER)
    assert again.latest() == (ORDER, None, False)


def test_session_numbers_are_never_given_twice_and_belong_to_one_state_folder(journal_at, tmp_path):
    begun = [journal_at().begin_sessions() for _ in range(3)]
    assert [first for _, first in begun] == [1, 1 + SESSIONS, 1 + 2 * SESSIONS]
    (state_id,) = {state_id for state_id, _ in begun}
    assert len(state_id) == 16
    with contextlib.closing(Journal(tmp_path / "another.db")) as other:
        assert other.begin_sessions()[0] != state_id


def test_a_copy_of_a_card_gets_an_id_of_its_own_on_another_board(journal_at):
    def begun_on(machine):
        return journal_at().begin_sessions(machine)[0]

    before = begun_on("")  # as before boards were noted
    assert begun_on("board a") == before
    assert begun_on("") == before  # the number cannot be read this time
    copied = begun_on("board b")
    assert copied != before
    assert begun_on("board b") == copied


def test_sessions_go_on_where_an_agent_that_wrote_each_left_off(journal_at):
    journal = journal_at()
    with journal._db:
        journal._db.execute("INSERT INTO counters VALUES ('session', 57)")
    assert journal.begin_sessions()[1] == 58


def test_kill_9_after_a_commit_keeps_it(tmp_path, journal_at):
    script = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import pytest

from edge_agent.journal import Journal
from tests.agent.test_journal import ORDER, RESULT
journal = Journal(Path("journal.db"))
journal.accept(ORDER)
journal.finish(ORDER, RESULT, "weights-3")
print("committed", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script.format(root=str(ROOT))], cwd=tmp_path, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"committed\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert journal_at().latest() == (ORDER, RESULT, False)
