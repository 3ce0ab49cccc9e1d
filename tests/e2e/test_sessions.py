"""Who is who on the broker: new cards, two of one name, two runs on one fleet."""

import shutil
import signal

import pytest

from tests.e2e.test_run import Fleet, check_every_round_counts_each_device_once


@pytest.mark.e2e
def test_a_device_that_loses_its_card_in_mid_round_does_the_round_anew(
    processes, digits, any_broker
):
    """Its connection stands as after a power cut, so that no will says that it is gone."""
    fleet = Fleet(processes, digits, any_broker.url, rounds=1, epochs=4)
    path = fleet.folder / "run.toml"
    path.write_text(path.read_text().replace("deadline_s = 100.0", "deadline_s = 1e6"))
    fleet.agent(0)
    processes.wait_for("a first session", lambda: "connected to" in processes.log("agent-0"))
    processes.kill("agent-0")
    fleet.start()  # agent 0 with its second session
    processes.wait_for("training", lambda: fleet.stands("train", 1))
    former = processes.running["agent-0"]
    former.send_signal(signal.SIGSTOP)
    try:
        shutil.rmtree(fleet.folder / "state-0")
        fleet.agent(0)
        check_every_round_counts_each_device_once(fleet.finish(), 1)
    finally:
        former.kill()
        former.wait()
