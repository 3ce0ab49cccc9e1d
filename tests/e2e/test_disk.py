"""Real processes on a full, damaged or read-only disk report it, wait, and lose nothing."""

import sqlite3
from pathlib import Path

import pytest

from edge_agent.main import NO_DISK
from tests.conftest import Disk, Processes
from tests.e2e.test_bad_input import command
from tests.e2e.test_run import Fleet, check_every_round_counts_each_device_once

pytestmark = pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)


def move_state(fleet: Fleet, n: int, disk: Disk) -> None:
    path = fleet.folder / f"agent-{n}.toml"
    path.write_text(path.read_text().replace(f'"state-{n}"', f'"{disk.path}/state"'))


def spoil(journal: Path) -> None:
    for path in journal.parent.glob("journal.db-*"):  # SQLite would restore it from them
        path.unlink()
    journal.write_text("no journal\n" * 1000)


@pytest.mark.e2e
def test_an_order_on_a_full_card_waits_for_room_and_is_done(
    processes: Processes, digits, any_broker, disk
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2)
    move_state(fleet, 0, disk)
    fleet.agent(0)
    processes.wait_for("agent-0", lambda: "connected" in processes.log("agent-0"))
    disk.fill()
    fleet.orchestrator()
    fleet.agent(1)
    fleet.agent(2)
    said = f"the disk is full at {disk.path}/state"
    processes.wait_for("a word on the disk", lambda: said in processes.log("agent-0"))
    processes.wait_for("the others", lambda: fleet.reached("returned", 1))
    assert processes.running["agent-0"].poll() is None
    disk.make_room()
    check_every_round_counts_each_device_once(fleet.finish(), 2)
    log = processes.log("agent-0")
    assert log.count(said) == 1
    assert "the disk takes what was waiting; going on" in log
    assert "cannot be reached" not in log


@pytest.mark.e2e
def test_an_agent_that_is_started_on_a_full_card_waits_for_room(
    processes: Processes, digits, any_broker, disk
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=1)
    move_state(fleet, 0, disk)
    disk.fill()
    fleet.start()
    processes.wait_for("a word", lambda: "the disk is full" in processes.log("agent-0"))
    disk.make_room()
    check_every_round_counts_each_device_once(fleet.finish(), 1)


@pytest.mark.e2e
def test_a_journal_that_is_damaged_on_the_device_costs_it_no_round(
    processes: Processes, digits, any_broker
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2, epochs=6)
    fleet.start()
    processes.wait_for("training in round 1", lambda: fleet.reached("train", 1))
    processes.kill("agent-0")
    spoil(fleet.folder / "state-0/journal.db")
    fleet.agent(0)
    check_every_round_counts_each_device_once(fleet.finish(), 2)
    assert "set aside as journal.db.damaged-1" in processes.log("agent-0")


@pytest.mark.e2e
def test_a_full_disk_of_the_orchestrator_is_waited_for_and_loses_no_result(
    processes: Processes, digits, any_broker, disk
):
    fleet = Fleet(processes, digits, any_broker.url, strategy="fedavg", model="resnet8", rounds=3)
    path = fleet.folder / "run.toml"
    path.write_text(path.read_text().replace('name = "run"', f'name = "run"\nruns = "{disk.path}"'))
    (fleet.folder / "runs").symlink_to(disk.path)
    fleet.start_held()
    processes.wait_for("round 1", lambda: fleet.status()["round"] >= 1)
    disk.fill()
    processes.resume("agent-2")
    said = "the disk is full at"
    processes.wait_for("a word on the disk", lambda: said in processes.log("run"))
    disk.make_room()
    check_every_round_counts_each_device_once(fleet.finish(), 3)
    assert processes.log("run").count(said) == 1


@pytest.mark.e2e
def test_a_damaged_journal_of_a_run_goes_on_after_its_last_checkpoint(
    processes: Processes, digits, any_broker
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=3, epochs=6)
    fleet.start()
    processes.wait_for("training in round 2", lambda: fleet.reached("train", 2))
    processes.kill("run")
    journal = fleet.folder / "runs/run/journal.db"
    with sqlite3.connect(journal) as db:
        (run,) = db.execute("SELECT run FROM identity").fetchone()
    spoil(journal)
    fleet.orchestrator()
    check_every_round_counts_each_device_once(fleet.finish(), 3)
    log = processes.log("run")
    assert "set aside as journal.db.damaged-1" in log.replace("\n", " ")
    with sqlite3.connect(journal) as db:
        assert db.execute("SELECT run FROM identity").fetchone() == (run,)


def test_a_read_only_or_shared_place_ends_with_one_line(
    processes: Processes, digits, any_broker, disk
):
    fleet = Fleet(processes, digits, any_broker.url)
    move_state(fleet, 0, disk)
    run = fleet.folder / "run.toml"
    run.write_text(run.read_text().replace('name = "run"', f'name = "run"\nruns = "{disk.path}"'))
    fleet.agent(0)
    processes.wait_for("agent-0", lambda: "connected" in processes.log("agent-0"))
    agent = ("edge_agent.main", "run", "--config", "agent-0.toml")
    code, error = command(fleet.folder, *agent)
    assert (code, error.count("\n")) == (NO_DISK, 1)
    assert f"in use by process {processes.running['agent-0'].pid} " in error
    processes.running["agent-0"].terminate()
    assert processes.running["agent-0"].wait(20) == 0
    disk.read_only()
    start = ("orchestrator.main", "start", "--config", "run.toml")
    for arguments, expected in ((agent, NO_DISK), (start, 2)):
        code, error = command(fleet.folder, *arguments)
        assert code == expected
        assert error.splitlines()[-1].count("the file system is read-only; mount it") == 1
