"""Identities on the broker: new cards, two devices of one name, two runs on one fleet."""

import shutil
import signal

import pytest

from edge_agent.main import NO_DISK
from tests.e2e.test_run import Fleet, check_every_round_counts_each_device_once


@pytest.mark.e2e
def test_a_device_that_loses_its_card_in_mid_round_does_the_round_anew(
    processes, digits, any_broker
):
    """Its connection stays open as after a power cut, so no will says that it is gone."""
    fleet = Fleet(processes, digits, any_broker.url, rounds=1, epochs=4)
    path = fleet.folder / "run.toml"
    path.write_text(path.read_text().replace("deadline_s = 1000.0", "deadline_s = 1e6"))
    fleet.agent(0)
    processes.wait_for("a first session", lambda: "connected to" in processes.log("agent-0"))
    processes.kill("agent-0")
    fleet.start()  # agent 0 begins its second session
    processes.wait_for("training", lambda: fleet.reached("train", 1))
    former = processes.running["agent-0"]
    former.send_signal(signal.SIGSTOP)
    try:
        shutil.rmtree(fleet.folder / "state-0")
        fleet.agent(0)
        check_every_round_counts_each_device_once(fleet.finish(), 1)
    finally:
        former.kill()
        former.wait()


@pytest.mark.e2e
def test_a_second_run_on_a_fleet_ends_with_the_name_of_the_first_which_goes_on(
    processes, digits, any_broker
):
    """Both runs use one broker, but have separate folders of runs, as on two machines."""
    fleet = Fleet(processes, digits, any_broker.url, rounds=1)
    fleet.orchestrator()
    processes.wait_for("the first", lambda: "connected to" in processes.log("run"))
    text = (fleet.folder / "run.toml").read_text().replace('name = "run"', 'name = "late"')
    (fleet.folder / "late.toml").write_text(f'runs = "elsewhere"\n{text}')
    late = processes.start("late", "orchestrator.main", "start", "--config", "late.toml")
    assert late.wait(240) == 2
    assert "orchestrator: fleet 'fleet' is in use by run 'run." in processes.log("late")
    for n in range(3):
        fleet.agent(n)
    check_every_round_counts_each_device_once(fleet.finish(), 1)
    again = processes.start("late", "orchestrator.main", "start", "--config", "late.toml")
    joined = "round 1 of 1: 3 devices"
    processes.wait_for("the second's turn", lambda: joined in processes.log("late"))
    again.kill()
    again.wait()


def test_a_second_run_of_one_folder_ends_before_it_leaves_anything(processes, digits):
    fleet = Fleet(processes, digits, "mqtt://127.0.0.1:9")
    fleet.orchestrator()
    lock = fleet.folder / "runs/fleet-fleet.lock"
    processes.wait_for("the first", lambda: lock.exists() and lock.read_text() == "run")
    text = (fleet.folder / "run.toml").read_text().replace('name = "run"', 'name = "late"')
    (fleet.folder / "late.toml").write_text(text)
    late = processes.start("late", "orchestrator.main", "start", "--config", "late.toml")
    assert late.wait(240) == 2
    assert "fleet 'fleet' is in use by run 'run'" in processes.log("late")
    assert not (fleet.folder / "runs/late").exists()
    twice = processes.start("twice", "orchestrator.main", "start", "--config", "run.toml")
    assert twice.wait(240) == 2
    assert "run 'run' of fleet 'fleet' is running already" in processes.log("twice")


def test_a_second_agent_in_one_state_folder_is_refused(processes, digits):
    fleet = Fleet(processes, digits, "mqtt://127.0.0.1:9")
    fleet.agent(0)
    processes.wait_for("the first", lambda: "cannot be reached" in processes.log("agent-0"))
    text = (fleet.folder / "agent-1.toml").read_text().replace("state-1", "state-0")
    (fleet.folder / "agent-1.toml").write_text(text)
    fleet.agent(1)
    assert processes.running["agent-1"].wait(240) == NO_DISK
    assert f"{fleet.folder}/state-0 is in use by process" in processes.log("agent-1")
    assert f"process {processes.running['agent-0'].pid}" in processes.log("agent-1")


@pytest.mark.e2e
def test_two_devices_of_one_name_are_told_of_on_both_sides(processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url)
    text = (fleet.folder / "agent-1.toml").read_text().replace("device-1", "device-0")
    (fleet.folder / "agent-1.toml").write_text(text)
    fleet.orchestrator()
    for n in (0, 1):
        fleet.agent(n)
    rival = "is another agent at work as 'device-0'? Each needs a name of its own"
    for n in (0, 1):
        processes.wait_for("a remedy", lambda n=n: rival in processes.log(f"agent-{n}"))
    processes.wait_for("it", lambda: "device-0: two agents of this name" in processes.log("run"))
