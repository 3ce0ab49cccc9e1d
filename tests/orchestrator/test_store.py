"""A run continues from its folder where it stopped, and only one process uses the folder."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.main import app
from orchestrator.rules.attempt import Verdict
from orchestrator.run_folder.journal import Journal
from orchestrator.run_folder.store import Store, last_checkpoint, roll_back
from orchestrator.strategies.strategy import Checkpoint
from tests.agent.test_disk import DAMAGE
from wire import storage
from wire.errors import RunError, StalledError, StorageError
from wire.messages import BlobRef, Order, Result
from wire.storage import Patience

REF = BlobRef("ab" * 32, 1000, 1024)


@pytest.fixture
def config(tmp_path):
    return RunConfig(name="run", heldout=Path("heldout.npz"), runs=tmp_path)


@pytest.fixture
def opened():
    """Opens stores that are closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(config):
            store = Store(config)
            stack.callback(store.close)
            return store

        yield make


def order(sequence: int) -> Order:
    return Order("run", sequence, 1, REF, 1, 0.1, 7, {"features": "float32"})


EMPTY = Checkpoint({"w": np.ones(1, np.float32)}, {})


def verdict(device: str, sequence: int, accepted: bool) -> Verdict:
    return Verdict(device, accepted, "", Result(device, "run", sequence, 1, 10))


def test_an_open_round_is_restored_with_its_verdicts(config, opened):
    store = opened(config)
    assert store.last_attempt() is None
    assert store.next_sequence() == 1
    store.begin(1, {"a": order(1), "b": order(1)})
    store.decide(1, verdict("a", 1, accepted=True))
    store.close()
    again = opened(config)
    attempt = again.last_attempt()
    assert (attempt.sequence, attempt.round) == (1, 1)
    assert attempt.orders == {"a": order(1), "b": order(1)}
    assert attempt.verdicts == {"a": verdict("a", 1, accepted=True)}


def test_a_late_result_is_known_by_its_own_order_and_in_the_round_it_counts_in(config, opened):
    store = opened(config)
    store.close_round(store.begin(1, {"a": order(1), "b": order(1)}), EMPTY, {"round": 1})
    attempt = store.begin(2, {"a": replace(order(2), round=2), "b": order(1)})
    late = verdict("b", 1, accepted=True)
    store.decide(attempt.sequence, late)
    assert store.verdict(1, "b") == late
    assert store.last_attempt().verdicts == {"b": late}
    assert store.last_attempt(closed=True).round == 1


def test_attempts_at_a_round_in_which_nobody_returned_are_counted_over_restarts(config, opened):
    store = opened(config)
    assert store.retries() == 0
    store.close_round(store.begin(1, {"a": order(1)}), EMPTY, {"round": 1})
    assert store.retries() == 0
    for sequence in (2, 3, 4):
        attempt = store.begin(2, {"a": order(sequence)})
    store.close()
    again = opened(config)
    assert again.retries() == 2
    again.close_round(attempt, EMPTY, {"round": 2})
    assert again.retries() == 0


def test_bytes_that_an_earlier_orchestrator_counted_in_the_open_round_stay_counted(config, opened):
    store = opened(config)
    report = Report(config, store)
    store.begin(1, {"a": order(1)})
    report.received("a", 100)
    report.received("a", 50)
    report.sent("a", 7)
    store.close()
    again = opened(config)
    report = Report(config, again)
    report.received("a", 1)
    attempt = replace(again.last_attempt(), verdicts={"a": verdict("a", 1, accepted=True)})
    device = report.closed(attempt, {}, 1.0)["devices"]["a"]
    assert (device["bytes_up"], device["bytes_down"]) == (151, 7)
    again.begin(2, {"a": order(2)})
    assert again.traffic() == {}


def test_the_first_word_on_a_result_stands(config, opened):
    store = opened(config)
    store.begin(1, {"a": order(1)})
    store.decide(1, verdict("a", 1, accepted=True))
    store.decide(1, verdict("a", 1, accepted=False))
    assert store.verdict(1, "a").accepted


def test_checkpoints_come_back_and_blobs_nobody_needs_go(config, opened):
    store = opened(config)
    kept, dropped, artifact = (store.blobs.put(text) for text in (b"kept", b"dropped", b"artifact"))
    store.keep(frozenset([artifact.digest]))
    assert store.checkpoint() is None
    for round_ in (1, 2, 3):
        attempt = store.begin(round_, {"a": order(round_)})
        notes = {"blobs": [kept.digest], "n": round_}
        state = Checkpoint({"w": np.full(3, round_, np.float32)}, notes)
        store.close_round(attempt, state, {"round": round_})
    assert [entry["round"] for entry in store.closed_rounds()] == [1, 2, 3]
    assert store.last_attempt().closed
    state = store.checkpoint()
    np.testing.assert_array_equal(state.tensors["w"], [3, 3, 3])
    assert state.notes == {"blobs": [kept.digest], "n": 3}
    assert store.blobs.has(kept.digest)
    assert store.blobs.has(artifact.digest)
    assert not store.blobs.has(dropped.digest)
    assert sorted(p.name for p in (config.folder / "checkpoints").iterdir()) == ["0002", "0003"]


def test_tensors_of_any_memory_layout_come_back_as_they_were(config, opened):
    store = opened(config)
    wanted = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    channels_last = np.ascontiguousarray(wanted.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    state = Checkpoint({"w": channels_last, "step": np.float32(7).reshape(())}, {})
    store.close_round(store.begin(1, {}), state, {"round": 1})
    back = store.checkpoint().tensors
    np.testing.assert_array_equal(back["w"], wanted)
    assert back["step"].shape == ()


def test_a_crash_between_checkpoint_and_journal_repeats_the_round(config, opened):
    store = opened(config)
    store.begin(1, {"a": order(1)})
    half = config.folder / "checkpoints" / "0001"  # written, but not in the journal
    half.mkdir(parents=True)
    (half / "state.json").write_text("{}")
    store.close()
    again = opened(config)
    assert again.checkpoint() is None
    attempt = again.last_attempt()
    again.close_round(attempt, Checkpoint({"w": np.ones(1, np.float32)}, {}), {"round": 1})
    assert again.checkpoint().tensors["w"] == 1


def test_a_journal_that_cannot_be_opened_is_named(config):
    (config.folder / "journal.db").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"journal\.db: expected a journal, got a folder"):
        Store(config)


def test_two_orchestrators_cannot_share_a_run(config, opened):
    first = opened(config)
    with pytest.raises(RunError, match="another orchestrator"):
        opened(config)
    first.close()
    opened(config).close()


def test_a_run_does_not_go_on_under_another_configuration(config, opened):
    opened(config).close()
    opened(replace(config, rounds=config.rounds + 5)).close()
    with pytest.raises(RunError, match=r"seed: the run began with 0, run\.toml says 1"):
        opened(replace(config, seed=1))


def test_a_run_begun_when_means_were_always_written_goes_on(config, opened):
    opened(config).close()
    began = json.loads((config.folder / "run.json").read_text())
    assert began["device"]["mean"] == [0.4914, 0.4822, 0.4465]
    assert began["device"]["std"] == [0.247, 0.2435, 0.2616]
    opened(replace(config, device=replace(config.device, mean=(), std=()))).close()


def test_a_damaged_checkpoint_is_named(config, opened):
    store = opened(config)
    store.close_round(store.begin(1, {}), EMPTY, {"round": 1})
    path = config.folder / "checkpoints" / "0001" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(RunError, match="0001 is damaged"):
        store.checkpoint()


def closed(store, rounds, score=lambda _: None):
    """Close rounds; a score becomes the server's accuracy."""
    for round_ in rounds:
        state = Checkpoint({"w": np.full(3, round_, np.float32)}, {"n": round_})
        attempt = store.begin(round_, {"a": order(round_)})
        accuracy = {} if score(round_) is None else {"server_accuracy": score(round_)}
        store.close_round(attempt, state, {"round": round_, **accuracy})


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, flip_a_bit])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "digests.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_counts(
    config, opened, caplog, name, damage
):
    store = opened(config)
    closed(store, (1, 2, 3))
    open_attempt = store.begin(4, {"a": order(4)})
    store.decide(open_attempt.sequence, verdict("a", open_attempt.sequence, accepted=True))
    store.close()
    damage(config.folder / "checkpoints" / "0003" / name)
    if (name, damage) == ("digests.json", Path.unlink):  # as an older version wrote it
        assert opened(config).checkpoint().notes == {"n": 3}
        return
    again = opened(config)
    assert again.checkpoint().notes == {"n": 2}
    assert [entry["round"] for entry in again.closed_rounds()] == [1, 2]
    assert (again.last_attempt().round, again.last_attempt().closed) == (2, True)
    assert again.retries() == 0
    assert again.next_sequence() == open_attempt.sequence + 1
    folders = sorted(path.name for path in (config.folder / "checkpoints").iterdir())
    assert folders == ["0002", "0003.damaged-1"]
    (told,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert "0003 is damaged: " in told
    assert "The run goes on after round 2" in told
    closed(again, (3, 4))
    assert again.checkpoint().notes == {"n": 4}
    again.close()
    assert last_checkpoint(config.folder)[0] == 4


def test_a_missing_checkpoint_is_as_good_as_a_damaged_one(config, opened, caplog):
    store = opened(config)
    closed(store, (1, 2, 3))
    store.close()
    (config.folder / "checkpoints" / "0003").rename(config.folder / "elsewhere")
    assert opened(config).checkpoint().notes == {"n": 2}
    assert "0003 is damaged: [Errno 2] No such file" in caplog.text


def test_a_start_goes_back_by_itself_only_a_little(config, opened):
    store = opened(config)
    closed(store, range(1, 8), lambda n: 1.0 if n == 2 else 0.1)
    store.close()
    for number in (6, 7):
        flip_a_bit(config.folder / "checkpoints" / f"000{number}" / "state.json")
    with pytest.raises(RunError, match=r"0007 is .* of round 2; .* rollback .*run --round 2"):
        opened(config)
    assert kept(config, 7)
    roll_back(config.folder, 2)
    assert opened(config).checkpoint().notes == {"n": 2}


def test_if_no_checkpoint_can_be_read_the_newest_is_named(config, opened):
    store = opened(config)
    closed(store, (1, 2))
    store.close()
    for number in (1, 2):
        flip_a_bit(config.folder / "checkpoints" / f"000{number}" / "state.json")
    again = opened(config)
    with pytest.raises(RunError, match=r"0002 is damaged: state.json has SHA-256 .*; restore"):
        again.checkpoint()
    assert (config.folder / "checkpoints" / "0002").exists()


def test_the_best_checkpoint_and_every_so_many_are_kept(config, opened):
    scores = [0.1, 0.2, 0.9, 0.3, None, 0.4, 0.5, 0.6, 0.7]
    config = replace(config, keep_every=4, rounds=20)
    store = opened(config)
    closed(store, range(1, 8), lambda n: scores[n - 1])
    assert [n for n in range(1, 10) if kept(config, n)] == [3, 4, 6, 7]
    store.close()
    again = opened(replace(config, keep_every=0))
    closed(again, (8, 9), lambda n: scores[n - 1])
    assert [n for n in range(1, 10) if kept(config, n)] == [3, 8, 9]


def kept(config, number):
    return (config.folder / "checkpoints" / f"{number:04d}").exists()


def test_a_rollback_undoes_the_rounds_after(config, opened):
    config = replace(config, keep_every=2, rounds=20)
    store = opened(config)
    closed(store, range(1, 8))
    with pytest.raises(RunError, match="another orchestrator is running this run"):
        roll_back(config.folder, 4)
    sequence = store.next_sequence()
    store.close()
    for number in (3, 7, 8, 0):
        with pytest.raises(RunError, match=rf"after round 7. It can go back to 2, 4, 6, whose .*"
                                           rf"not to {number}; keep_every"):  # fmt: skip
            roll_back(config.folder, number)
    roll_back(config.folder, 4)
    again = opened(config)
    assert again.checkpoint().notes == {"n": 4}
    assert [entry["round"] for entry in again.closed_rounds()] == [1, 2, 3, 4]
    assert again.next_sequence() == sequence
    closed(again, (5,))
    again.close()
    roll_back(config.folder, 4)
    folders = {path.name for path in (config.folder / "checkpoints").iterdir()}
    assert folders == {"0002", "0004", "0005.undone-1", "0006.undone-1", "0007.undone-1"}
    with pytest.raises(RunError, match="holds no run"):
        roll_back(config.folder.parent, 4)
    done = CliRunner().invoke(app, ["rollback", str(config.folder), "--round", "2"])
    assert done.exit_code == 0
    assert "back to round 2; later checkpoints are set aside as" in " ".join(done.output.split())
    assert last_checkpoint(config.folder)[0] == 2


def test_commands_that_read_say_when_there_is_nothing(tmp_path):
    with pytest.raises(RunError, match="no round is finished"):
        last_checkpoint(tmp_path)


def test_json_files_are_replaced_whole(config, opened):
    store = opened(config)
    store.write_json("status.json", {"a": 1})
    assert json.loads((config.folder / "status.json").read_text()) == {"a": 1}
    assert not (config.folder / "status.json.new").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_goes_on_after_the_last_checkpoint(config, opened, damage, caplog):
    store = opened(config)
    run = store.run_id
    for round_ in (1, 2):
        state = Checkpoint({"w": np.full(1, round_, np.float32)}, {})
        store.close_round(store.begin(round_, {"a": order(round_)}), state, {"round": round_})
    attempt = store.begin(3, {"a": order(3), "b": order(3)})
    store.decide(attempt.sequence, verdict("a", attempt.sequence, accepted=True))
    store.close()
    DAMAGE[damage](config.folder / "journal.db")
    again = opened(config)
    assert again.run_id == run
    assert [entry["round"] for entry in again.closed_rounds()] == [1, 2]
    assert again.checkpoint().tensors["w"] == 2
    assert (again.last_attempt().round, again.last_attempt().closed) == (2, True)
    assert again.next_sequence() > attempt.sequence + 1000  # devices' orders are older
    assert "Lost is what devices had sent in round 3" in caplog.text
    again.close()
    assert opened(config).run_id == run


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_without_a_checkpoint_is_told_and_left(config, opened, damage):
    store = opened(config)
    store.begin(1, {"a": order(1), "b": order(1)})
    store.decide(1, verdict("a", 1, accepted=True))
    store.close()
    path = config.folder / "journal.db"
    DAMAGE[damage](path)
    left = path.read_bytes() if path.exists() else b""
    with pytest.raises(RunError, match=r"what devices sent is lost.*choose another name"):
        opened(config)
    assert path.read_bytes()[: len(left)] == left or damage in ("no bytes", "gone")


def test_a_run_is_discarded_before_its_first_round_and_never_after(config):
    store = Store(config)
    assert store.discard()
    assert not config.folder.exists()
    store = Store(config)
    store.begin(1, {"pi": order(1)})
    for path in config.folder.glob("journal.db*"):  # the store that is open finds it damaged
        path.write_bytes(b"no journal\n" * 1000)
    assert not store.discard()
    assert (config.folder / "run.json").exists()


@pytest.mark.parametrize("text", ['{"name": ', "[]", "7", '["broker"]'])
def test_a_damaged_configuration_of_a_run_is_named(config, opened, text):
    opened(config).close()
    (config.folder / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        opened(config)


def test_a_journal_that_another_program_holds_is_waited_for_also_where_it_is_read(
    config, opened, monkeypatch
):
    store = opened(config)
    store.begin(1, {"a": order(1)})
    store.decide(1, verdict("a", 1, accepted=True))
    met = []
    store.patience = Patience(stopped=lambda _: False)
    read = Journal._do

    def held_at_first(self, work):
        if not met:
            met.append(work)
            raise StalledError("journal.db is held by process 7 (backup); end that program")
        return read(self, work)

    for ask, expected in (
        (lambda: store.verdict(1, "a"), verdict("a", 1, accepted=True)),
        (store.next_sequence, 2),
    ):
        met.clear()
        monkeypatch.setattr(Journal, "_do", held_at_first)
        assert ask() == expected
        assert met
        monkeypatch.undo()
    assert store.verdict(1, "b") is None


def test_the_settings_that_a_run_began_with_survive_a_power_cut(config, opened, monkeypatch):
    synced = []
    monkeypatch.setattr(storage, "sync_folder", synced.append)
    store = opened(config)
    assert config.folder in synced
    assert json.loads((store.folder / "run.json").read_text())["name"] == "run"
