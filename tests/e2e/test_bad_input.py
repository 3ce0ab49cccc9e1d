"""Bad input gives one line with the fault and the remedy, and exit code 2; nothing is lost."""

import json
import os
import queue
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_agent.main import NO_DISK, NO_IMAGES, REFUSED
from orchestrator import broker, config
from tests.conftest import ROOT, Processes
from tests.e2e.test_run import Fleet
from wire import frames, messages, records, topics
from wire.address import BrokerAddress
from wire.frames import Kind
from wire.link import Arrived, Link
from wire.messages import Birth, BlobRef, Message, Order, Result

NOWHERE = "mqtt://127.0.0.1:9"  # the discard port: nobody listens


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run `python -m ARGUMENTS` to its end; return exit code and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


def agent(folder: Path, digits: Path, **changes: str) -> tuple[int, str]:
    settings = {
        "device": '"pi"', "fleet": '"fleet"', "data": f'"{digits}/device-0.npz"',
        "state": '"state"', **changes,
    }  # fmt: skip
    text = "".join(f"{key} = {value}\n" for key, value in settings.items())
    (folder / "agent.toml").write_text(f'{text}[broker]\nurl = "{NOWHERE}"\n')
    return command(folder, "edge_agent.main", "run", "--config", "agent.toml")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"treads": "2"}, "unknown key 'treads'; did you mean 'threads'"),
        ({"threads": '"two"'}, "threads: expected int, got str 'two'"),
        ({"device": '"a/b"'}, "device name 'a/b': use 1 to 64"),
        ({"data": '"missing.npz"'}, "missing.npz: expected an .npz file or a folder"),
        ({"image": "[3, 64, 64]"}, "expected 64x64 images with 3 channels, got 32x32"),
    ],
)
def test_an_agent_that_cannot_work_says_why(tmp_path, digits, changes, text):
    code, error = agent(tmp_path, digits, **changes)
    assert code == (NO_IMAGES if {"data", "image"} & set(changes) else 2)
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (("[server]", "[sever]"), "unknown key 'sever'; did you mean 'server'"),
        (('"first"', '"a b"'), "run name 'a b': use 1 to 64"),
        (('"resnet8"', '"resnte8"'), "did you mean 'resnet8'"),
        (("identity|q=8", "identety|q=8"), "did you mean 'identity|q=8'"),
        (('update = "float32"', 'update = "hadamrd|q=4"'), "did you mean 'hadamard|q=4'"),
        (('state = "float32"', 'state = "kashin|q=9"'), "q must be 1 to 8 bits, got 9"),
        (('state = "float32"', "mu = -1"), "mu: expected 0 (no proximal term) or more, got -1"),
        (('"fedgkt" ', '"fedavg"\nsubmodel = {keep_rate = 0.5}\n'), "use feddropout"),
        (
            ('"fedgkt" ', '"feddropout"\nsubmodel = {keep_rate = 1.5}\n'),
            "keep_rate: expected over 0 to 1 (the whole model), got 1.5",
        ),
        (
            ('"fedgkt" ', '"feddropout"\nsubmodel = {tiers = [{keep_rate = 0.5}]}\n'),
            "expected a pattern of names in `devices`, or `memory_mb` over 0",
        ),
        (("classes = 10", "classes = 7"), "expected 7 classes, got 10"),
        (("[3, 32, 32]", "[3, 28, 28]"), "expected 28x28 images"),
        (('"data/heldout.npz"', '"nowhere.npz"'), "nowhere.npz"),
        (('"embedded"', '"external"'), "an external broker, and only that, has a url"),
        (('"127.0.0.1"', '"0.0.0.0"'), "loopback only"),
    ],
)
def test_a_run_that_cannot_start_says_why(tmp_path, digits, changes, text):
    settings = config.template("fedgkt")
    assert changes[0] in settings
    (tmp_path / "run.toml").write_text(settings.replace(*changes))
    (tmp_path / "data").symlink_to(digits)
    code, error = command(tmp_path, "orchestrator.main", "start", "--config", "run.toml")
    assert code == 2
    assert text in error


def test_init_overwrites_nothing(tmp_path):
    assert command(tmp_path, "orchestrator.main", "init")[0] == 0
    (tmp_path / "run.toml").write_text("mine")
    code, error = command(tmp_path, "orchestrator.main", "init")
    assert (code, (tmp_path / "run.toml").read_text()) == (2, "mine")
    assert "nothing was written" in error


def test_an_unreachable_broker_is_tried_again_and_said_so(processes: Processes, digits):
    path = processes.folder / "agent.toml"
    path.write_text(
        f'device = "pi"\nfleet = "fleet"\ndata = "{digits}/device-0.npz"\nstate = "state"\n'
        f'[broker]\nurl = "{NOWHERE}"\n'
    )
    process = processes.start("agent", "edge_agent.main", "run", "--config", "agent.toml")
    said = f"broker {NOWHERE} cannot be reached"
    processes.wait_for("two attempts", lambda: processes.log("agent").count(said) >= 2)
    assert process.poll() is None


def test_a_device_with_an_unknown_name_is_refused(processes: Processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url)
    text = (processes.folder / "run.toml").read_text()
    (processes.folder / "run.toml").write_text(text.replace('"open"', '"enrolled"'))
    fleet.orchestrator()
    fleet.agent(0)
    processes.wait_for(
        "a refusal at the device",
        lambda: "device 'device-0' is not enrolled in fleet 'fleet'" in processes.log("agent-0"),
    )


@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_an_order_beyond_this_agent_is_answered_and_the_next_one_followed(
    processes: Processes, digits, any_broker
):
    """A newer orchestrator may send such an order; nothing waits for the deadline."""
    fleet = Fleet(processes, digits, any_broker.url, rounds=1)
    events: queue.SimpleQueue = queue.SimpleQueue()
    heard = [(topics.topic("fleet", "device-0", channel), 1) for channel in ("birth", "result")]
    link = Link(BrokerAddress(any_broker.url), "newer", subscriptions=heard, emit=events.put)

    def said() -> Message:
        while not isinstance(event := events.get(timeout=120.0), Arrived):
            pass
        return messages.decode(event.payload, sender="device-0")[0]

    link.start()
    assert link.wait_connected(60.0)
    fleet.agent(0)
    order = Order("run", 7, 2, BlobRef("ab" * 32, 1000, 1024), 1, 0.1, 1, {"state": "float32"})
    assert isinstance(said(), Birth)
    for key in ("sketch", 300_000 * "\1"):  # the second would not fit into an answer
        header = {**records.plain(order), key: "dct"}
        link.publish(topics.topic("fleet", "device-0", "order"), frames.encode(Kind.ORDER, header))
        answer = said()
        assert isinstance(answer, Result)
        assert (answer.run, answer.sequence, answer.round, answer.blobs) == ("run", 7, 2, {})
        assert "cannot follow it" in answer.fault
        assert f"unknown key {key!r:.80}" in answer.fault
    link.close()
    fleet.orchestrator()
    fleet.agent(1)
    fleet.agent(2)
    assert fleet.finish()["rounds"][0]["devices"]["device-0"]["accepted"]


def test_a_wrong_password_ends_the_agent_with_a_remedy(tmp_path, digits):
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    users = {"pi": "right"}
    with broker.start(
        "mosquitto", folder=tmp_path / "broker", fleet="fleet", port=0, users=users
    ) as running:
        (tmp_path / "agent.toml").write_text(
            f'device = "pi"\nfleet = "fleet"\ndata = "{digits}/device-0.npz"\nstate = "state"\n'
            f'[broker]\nurl = "{running.url}"\nusername = "pi"\npassword = "wrong"\n'
        )
        code, error = command(tmp_path, "edge_agent.main", "run", "--config", "agent.toml")
    assert code == REFUSED
    assert "check username, password and certificate" in error
    assert "As a service it tries again" in error


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_a_device_whose_data_do_not_fit_fails_alone(processes: Processes, digits, any_broker):
    """A device whose labels exceed the artifact's classes is refused, and the round continues."""
    fleet = Fleet(processes, digits, any_broker.url, rounds=1)
    with np.load(digits / "device-2.npz") as good:
        np.savez(processes.folder / "odd.npz", x=good["x"], y=good["y"] + 5)
    path = processes.folder / "agent-2.toml"
    path.write_text(path.read_text().replace(f"{digits}/device-2.npz", "odd.npz"))
    fleet.start()
    report = fleet.finish()
    devices = report["rounds"][0]["devices"]
    assert [devices[f"device-{n}"]["accepted"] for n in range(3)] == [True, True, False]
    assert "expected labels from 0 to 9" in devices["device-2"]["reason"]


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_a_damaged_artifact_on_the_device_is_fetched_anew(processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2, epochs=6)
    fleet.start()
    processes.wait_for("training in round 1", lambda: fleet.reached("train", 1))
    processes.kill("agent-0")
    (artifact,) = (processes.folder / "state-0/artifacts").iterdir()
    graph = artifact / "train.onnx"
    graph.write_bytes(graph.read_bytes()[:-100])
    fleet.agent(0)
    report = fleet.finish()
    assert all(entry["devices"]["device-0"]["accepted"] for entry in report["rounds"])
    assert "train.onnx: expected" in processes.log("agent-0")
    assert "pulling it again" in processes.log("agent-0")


def test_the_status_of_no_run_says_so(tmp_path):
    code, error = command(tmp_path, "orchestrator.main", "status", "nothing")
    assert code == 2
    assert "holds no run" in error
    code, error = command(tmp_path, "orchestrator.main", "export", "nothing", "--out", "m.onnx")
    assert code == 2
    assert json.dumps("nothing")[1:-1] in error


def test_systemd_starts_an_agent_again_but_for_its_settings():
    unit = (ROOT / "hardware/package/stillhouse-edge-agent.service").read_text()
    assert "\nRestart=on-failure\n" in unit
    never = re.findall(r"(?m)^RestartPreventExitStatus=(.*)$", unit)[0].split()
    assert not {str(NO_IMAGES), str(NO_DISK), str(REFUSED)} & {*never}
    assert never == ["2"]
