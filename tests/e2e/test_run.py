"""Whole runs with real processes: commands as a user starts them, killed as in a real fleet."""

import json
import os
import signal
import sqlite3
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edge_agent.main import REFUSED
from orchestrator import broker
from orchestrator.config import load, template
from orchestrator.deploy.export import export_run
from orchestrator.launch import prepare
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.simulation import simulate
from orchestrator.training import distill
from tests.conftest import Processes, free_port
from wire import messages, topics
from wire.address import BrokerAddress
from wire.link import Link
from wire.messages import Birth, Platform, Result

RUN = """\
name = "run"
fleet = "fleet"
strategy = "{strategy}"
rounds = {rounds}
heldout = "{digits}/heldout.npz"
admission = "open"
[broker]
kind = "external"
url = "{url}"
[cohort]
min_devices = 3
wait_s = 0.0
deadline_s = 1000.0
[device]
model = "{model}"
batch = 16
lr = 0.02
epochs = {epochs}
mean = [0.3, 0.3, 0.3]
std = [0.37, 0.37, 0.37]
[server]
model = "resnet10"
epochs = 1
batch = 32
"""

AGENT = """\
device = "device-{n}"
fleet = "fleet"
data = "{digits}/device-{n}.npz"
state = "state-{n}"
threads = 1
resend_s = 2.0
retry_s = 2.0
telemetry_s = 0.05
[broker]
url = "{url}"
"""


class Fleet:
    """One run's files and processes."""

    def __init__(self, processes: Processes, digits: Path, url: str, **run: object) -> None:
        self.processes, self.folder = processes, processes.folder
        settings = {"strategy": "fedgkt", "model": "resnet8", "rounds": 2, "epochs": 1, **run}
        (self.folder / "run.toml").write_text(RUN.format(digits=digits, url=url, **settings))
        for n in range(3):
            text = AGENT.format(digits=digits, url=url, n=n)
            (self.folder / f"agent-{n}.toml").write_text(text)

    def orchestrator(self) -> None:
        self.processes.start("run", "orchestrator.main", "start", "--config", "run.toml")

    def agent(self, n: int) -> None:
        self.processes.start(f"agent-{n}", "edge_agent.main", "run", "--config", f"agent-{n}.toml")

    def start(self) -> None:
        self.orchestrator()
        for n in range(3):
            self.agent(n)

    def status(self) -> dict:
        try:
            return json.loads((self.folder / "runs/run/status.json").read_text())
        except FileNotFoundError:
            return {"round": 0, "phase": "", "devices": {}, "history": []}

    def reached(self, stand: str, round_: int) -> bool:
        """Whether some device has reached a phase, or a later one, in a round.

        The status is written every half second, so it may never show a phase of a fast device.
        """
        status = self.status()
        stands = {device["stand"] for device in status["devices"].values()}
        return status["round"] > round_ or (
            status["round"] == round_ and bool(stands & {stand, "returned"})
        )

    def born(self, n: int) -> None:
        """Start an agent and wait until the orchestrator knows it."""
        self.agent(n)
        known = self.folder / f"runs/born-fleet/device-{n}.json"
        self.processes.wait_for(f"the birth of device-{n}", known.exists)

    def start_held(self) -> None:
        """Start all, and pause the last device once it is known, so that round 1 stays open.

        That device is sent its order, but can neither do it nor answer. After a minute the broker
        ends its connection.
        """
        self.orchestrator()
        for n in range(3):
            self.born(n)
        self.processes.pause("agent-2")

    def finish(self) -> dict:
        """Wait for the end of the run; return its report."""
        process = self.processes.running["run"]
        self.processes.wait_for("end of the run", lambda: process.poll() is not None, 600.0)
        return self.report()

    def report(self) -> dict:
        """The report of a run that has ended successfully."""
        assert self.processes.running["run"].returncode == 0, self.processes.log("run")
        return json.loads((self.folder / "runs/run/report.json").read_text())


def check_every_round_counts_each_device_once(report: dict, rounds: int) -> None:
    assert [entry["round"] for entry in report["rounds"]] == list(range(1, rounds + 1))
    for entry in report["rounds"]:
        assert entry["cohort"] == ["device-0", "device-1", "device-2"]
        assert all(d["accepted"] and d["samples"] == 64 for d in entry["devices"].values())


@pytest.mark.e2e
def test_fedgkt_over_each_broker(processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2)
    fleet.start()
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 2)
    for entry in report["rounds"]:
        assert 0 <= entry["server_accuracy"] <= 1
        for device in entry["devices"].values():
            features = 64 * 16 * 32 * 32  # one byte a value
            assert features < device["bytes_up"] < 1.1 * features
            assert device["train_flops"] > 64 * 2.9 * 19.24e6  # forward pass and both gradients
            assert 20e6 < device["train_peak_bytes"] < 2e9
    # Teacher logits of 64 samples reach the devices in round 2.
    assert report["rounds"][1]["devices"]["device-0"]["bytes_down"] > 64 * 10 * 4

    done = export_run(fleet.folder / "runs/run", fleet.folder / "model.onnx")
    assert done.difference < 1e-3
    with np.load(digits / "heldout.npz") as held:
        images = held["x"].transpose(0, 3, 1, 2).astype(np.float32) / 255
        labels = held["y"]
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": images})
    reported = report["rounds"][-1]["devices"][done.card.device]["server_accuracy"]
    assert (logits.argmax(axis=1) == labels).mean() == pytest.approx(reported, abs=0.011)


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_fedavg_learns(processes, digits, any_broker):
    fleet = Fleet(
        processes,
        digits,
        any_broker.url,
        strategy="fedavg",
        model="caldas_cnn",
        rounds=3,
        epochs=3,
    )
    fleet.start()
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 3)
    accuracies = [entry["server_accuracy"] for entry in report["rounds"]]
    assert accuracies[-1] > 0.5, accuracies  # chance is 0.1


TIERS = """
[submodel]
units = "{units}"
keep_rate = 0.5
[[submodel.tiers]]
devices = "device-2"
keep_rate = 0.25
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("any_broker", "units", "update"),
    [
        ("embedded", "random", '"eden|b=4/float16"'),
        ("mosquitto", "ordered", '"eden|b=4|mse/float16"\nfeedback = true'),
    ],
    indirect=["any_broker"],
)
def test_feddropout_ends_where_its_simulation_does_though_agent_and_orchestrator_are_killed(
    processes, digits, any_broker, units, update
):
    fleet = Fleet(
        processes, digits, any_broker.url, strategy="feddropout", model="caldas_cnn", rounds=2
    )
    path = fleet.folder / "run.toml"
    codecs = f'state = "hadamard|q=8"\nupdate = {update}\n[server]'
    path.write_text(path.read_text().replace("[server]", codecs) + TIERS.format(units=units))
    fleet.start()
    for name, again in (("agent-0", lambda: fleet.agent(0)), ("run", fleet.orchestrator)):
        number = 1 if name == "agent-0" else 2
        processes.wait_for(f"round {number}", lambda n=number: fleet.status()["round"] >= n)
        processes.kill(name)
        again()
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 2)

    simulated = replace(load(path), runs=fleet.folder / "simulated")
    expected = simulate.run(simulated, digits).entries
    for entry, same in zip(report["rounds"], expected, strict=True):
        for name, device in entry["devices"].items():
            payload = same["devices"][name]
            more = device["bytes_up"] - payload["bytes_up"]
            assert 0 <= more < payload["bytes_up"] / 2  # frames, and telemetry over time
            assert device["steps"] == payload["steps"]
            assert device["train_loss"] == pytest.approx(payload["train_loss"], rel=0.02)
        small, large = (entry["devices"][n]["train_flops"] for n in ("device-2", "device-0"))
        assert small < 0.5 * large
    before = distill.weights(prepare.fresh(simulated))
    _, real = last_checkpoint(fleet.folder / "runs/run")
    _, state = last_checkpoint(simulated.folder)
    for name, start in before.items():
        moved = state.tensors[f"global/{name}"] - start
        apart = real.tensors[f"global/{name}"] - state.tensors[f"global/{name}"]
        assert np.linalg.norm(apart) < 0.05 * np.linalg.norm(moved), name


@pytest.mark.e2e
def test_kill_9_of_agent_and_orchestrator_loses_and_repeats_nothing(processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url, rounds=3, epochs=8)
    fleet.start()
    processes.wait_for("training in round 1", lambda: fleet.reached("train", 1))
    processes.kill("agent-0")
    fleet.agent(0)
    processes.wait_for("training in round 2", lambda: fleet.reached("train", 2))
    processes.kill("run")
    processes.kill("agent-1")
    fleet.agent(1)
    fleet.orchestrator()
    processes.wait_for("a result in round 2", lambda: fleet.reached("returned", 2))
    processes.kill("run")
    fleet.orchestrator()
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 3)


@pytest.mark.e2e
def test_a_device_that_dies_delays_no_longer_than_the_deadline(processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2)
    text = (fleet.folder / "run.toml").read_text()
    text = text.replace("deadline_s = 1000.0", "deadline_s = 30.0").replace(
        "min_devices = 3\nwait_s = 0.0", "min_devices = 2\nmax_devices = 3\nwait_s = 300.0"
    )
    (fleet.folder / "run.toml").write_text(text)
    fleet.start_held()
    processes.wait_for("round 1", lambda: fleet.status()["round"] >= 1)
    processes.kill("agent-2")
    report = fleet.finish()
    first, second = report["rounds"]
    assert sorted(first["devices"]) == ["device-0", "device-1"]
    assert first["cohort"] == ["device-0", "device-1", "device-2"]
    assert second["cohort"] == ["device-0", "device-1"]


@pytest.mark.e2e
def test_a_late_device_counts_in_a_later_round_though_the_orchestrator_is_killed(
    processes, digits, any_broker
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=5)
    text = (fleet.folder / "run.toml").read_text()
    text = text.replace("[device]", "quorum = 0.6\ncarry_rounds = 5\n[device]").replace(
        "min_devices = 3\nwait_s = 0.0", "min_devices = 2\nmax_devices = 3\nwait_s = 300.0"
    )
    (fleet.folder / "run.toml").write_text(text)
    fleet.start_held()
    processes.wait_for("round 2", lambda: fleet.status()["round"] >= 2)
    processes.kill("run")
    fleet.orchestrator()
    processes.wait_for("round 3", lambda: fleet.status()["round"] >= 3)
    processes.kill("agent-1")  # two of three must answer, so the round waits for the late one
    processes.resume("agent-2")
    report = fleet.finish()
    for entry in report["rounds"]:
        assert all(device["accepted"] for device in entry["devices"].values() if "reason" in device)
    assert all("reason" not in e["devices"].get("device-2", {}) for e in report["rounds"][:2])
    journal = sqlite3.connect(fleet.folder / "runs/run/journal.db")
    rows = journal.execute("SELECT sequence, result FROM verdicts WHERE device = 'device-2'")
    counted = {sequence: messages.decode(data, sender="")[0] for sequence, data in rows}
    first = min(counted)
    assert counted[first].round == 1  # it counts under its own order, and under a later one
    assert any(result == counted[first] for s, result in counted.items() if s > first)


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_a_run_whose_every_device_diverges_gives_up_and_goes_on_when_started_again(
    processes, digits, any_broker
):
    fleet = Fleet(processes, digits, any_broker.url, strategy="fedavg", model="caldas_cnn")
    path = fleet.folder / "run.toml"
    path.write_text(path.read_text().replace("lr = 0.02", "lr = 1e30"))
    fleet.start()
    process = processes.running["run"]
    processes.wait_for("the run to give up", lambda: process.poll() is not None)
    assert process.returncode == 2
    log = processes.log("run")
    assert "round 1: every device that was asked failed, 3 times in a row; device-0 says: " in log
    assert "begin one of another name" in log
    opened = log.count("round 1 of 2: 3 devices")
    fleet.orchestrator()
    processes.wait_for(
        "round 1 again", lambda: processes.log("run").count("round 1 of 2: 3 devices") > opened
    )


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_a_device_that_speaks_for_others_fails_none_of_them(processes, digits, any_broker):
    fleet = Fleet(processes, digits, any_broker.url, rounds=1)
    link = Link(BrokerAddress(any_broker.url), "liar", subscriptions=[], emit=lambda _: None)
    link.start()
    assert link.wait_connected(60.0)
    fleet.start_held()
    processes.wait_for("training in round 1", lambda: fleet.reached("train", 1))
    with sqlite3.connect(fleet.folder / "runs/run/journal.db") as journal:
        (run,) = journal.execute("SELECT run FROM identity").fetchone()
    machine = Platform("liar", "x86_64", 1, 1 << 30, "", "")
    said = {"birth": [Birth("liar", 1, "0.1.0", 64, "ab" * 32, machine)]}
    said["result"] = [Result(name, run, 1, 1, 64) for name in ("device-0", "device-1", "nobody")]
    for channel, spoken in said.items():
        for message in spoken:
            link.publish(topics.topic("fleet", "liar", channel), messages.encode(message))
    text = "liar: result refused"
    processes.wait_for("refusals", lambda: processes.log("run").count(text) >= 3)
    link.close()
    processes.resume("agent-2")
    check_every_round_counts_each_device_once(fleet.finish(), 1)


@pytest.mark.e2e
def test_kill_9_of_the_broker_in_mid_round_is_no_more_than_a_pause(processes, digits, tmp_path):
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    with broker.start("mosquitto", folder=tmp_path / "broker", fleet="fleet", port=0) as running:
        fleet = Fleet(processes, digits, running.url, rounds=2, epochs=6)
        fleet.start()
        processes.wait_for("training in round 1", lambda: fleet.reached("train", 1))
        os.kill(running.pid, signal.SIGKILL)  # its supervisor restarts it
        report = fleet.finish()
    check_every_round_counts_each_device_once(report, 2)
    assert "lost" in processes.log("agent-0")


@pytest.mark.e2e
def test_enrolled_devices_join_a_mosquitto_of_ours_with_the_files_that_enroll_wrote(
    processes, digits
):
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    port = free_port()
    fleet = Fleet(processes, digits, "mqtt://unused", rounds=1)
    path = fleet.folder / "run.toml"
    text = path.read_text().replace('"open"', '"enrolled"').replace('"external"', '"mosquitto"')
    path.write_text(text.replace('url = "mqtt://unused"', f"port = {port}"))
    for n in range(3):
        if n == 2:  # the last one joins while the run goes on
            fleet.orchestrator()
            processes.wait_for("who is awaited", lambda: "0 of at least 3" in processes.log("run"))
        kit = fleet.folder / f"agent-{n}.toml"
        kit.unlink()
        enroll = ("orchestrator.main", "enroll", f"device-{n}", "--config", "run.toml")
        ours = ("--set", f"data={digits}/device-{n}.npz", "--set", f"state=state-{n}")
        assert processes.start("enroll", *enroll, "--out", kit.name, *ours).wait(300) == 0
        assert kit.stat().st_mode & 0o077 == 0  # it holds the password
    for n in range(3):
        fleet.agent(n)

    def begun() -> bool:
        if processes.running["agent-2"].poll() == REFUSED:  # it was faster than the broker
            fleet.agent(2)  # restart it, as its service does
        return fleet.status()["round"] == 1

    processes.wait_for("the round of all three", begun)
    check_every_round_counts_each_device_once(fleet.finish(), 1)
    shown = processes.start("status", "orchestrator.main", "status", "runs/run").wait(300)
    assert shown == 0
    assert "round 1 of 1" in processes.log("status")


def test_a_kit_for_the_package_names_its_folders(processes):
    key = "ed25519:" + "A" * 43 + "="
    (processes.folder / "run.toml").write_text(template(changes={"release.key": key}))
    enroll = ("orchestrator.main", "enroll", "pi", "--config", "run.toml", "--packaged")
    assert processes.start("enroll", *enroll).wait(300) == 0, processes.log("enroll")
    kit = tomllib.loads((processes.folder / "pi.toml").read_text())
    assert kit["release_key"] == key
    assert (kit["device"], kit["fleet"]) == ("pi", "fleet")
    assert kit["data"] == "/srv/stillhouse/images"
    assert kit["state"] == "/var/lib/stillhouse/state"
    assert len(kit["broker"]["password"]) > 10


def renamed(source: Path, target: Path, classes: dict[str, str | None]) -> None:
    """Write the images of some classes under other names, numbered in the order of the names."""
    with np.load(source) as arrays:
        x, y, stored = arrays["x"], arrays["y"], arrays["classes"].tolist()
    names = sorted(name for name in classes.values() if name)
    chosen = np.isin(y, [stored.index(old) for old in classes])
    labels = [names.index(classes[stored[n]]) for n in y[chosen]]
    np.savez(target, x=x[chosen], y=np.array(labels), classes=np.array(names))


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_a_device_with_a_misspelt_class_is_refused_until_mended_and_one_may_lack_classes(
    processes, digits, any_broker
):
    fleet = Fleet(
        processes, digits, any_broker.url, strategy="fedavg", model="caldas_cnn", rounds=3, epochs=3
    )
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    spelt = dict(zip("0123456789", words, strict=True))
    for name in ("device-0", "device-1", "heldout"):
        renamed(digits / f"{name}.npz", fleet.folder / f"{name}.npz", spelt)
    few = {digit: spelt[digit] for digit in "34567"}
    renamed(digits / "device-2.npz", fleet.folder / "device-2.npz", few | {"5": "Five"})
    path = fleet.folder / "run.toml"
    text = path.read_text().replace(f"{digits}/heldout.npz", "heldout.npz")
    path.write_text(text.replace("[device]", f"[device]\nclasses = {json.dumps(words)}"))
    for n in range(3):
        agent = fleet.folder / f"agent-{n}.toml"
        agent.write_text(agent.read_text().replace(f"{digits}/", ""))

    fleet.start()
    refused = (
        "the orchestrator refuses this device: device 'device-2': a class is not known: 'Five'"
    )
    processes.wait_for("the refusal", lambda: refused in processes.log("agent-2"))
    assert processes.running["agent-2"].poll() is None, "it stays, for the run may be another soon"
    processes.kill("run")
    fleet.orchestrator()  # it asks all devices for births, and refuses that device again
    said = "refused: device 'device-2': a class"
    processes.wait_for("the second", lambda: processes.log("run").count(said) == 2)
    assert processes.log("agent-2").count("refuses this device") == 1, "the log says it once"
    processes.wait_for("it is shown", lambda: "device-2" in fleet.status()["devices"])
    assert fleet.status()["devices"]["device-2"]["stand"] == "refused"
    assert "'Five'" in fleet.status()["devices"]["device-2"]["fault"]
    assert fleet.status()["round"] == 0

    processes.kill("agent-2")
    renamed(digits / "device-2.npz", fleet.folder / "device-2.npz", few)
    fleet.agent(2)
    report = fleet.finish()
    assert report["classes"] == words
    for entry in report["rounds"]:
        assert entry["cohort"] == ["device-0", "device-1", "device-2"]
        assert all(device["accepted"] for device in entry["devices"].values())
        assert entry["devices"]["device-2"]["samples"] < 64
    accuracies = [entry["server_accuracy"] for entry in report["rounds"]]
    assert accuracies[-1] > 0.5, accuracies  # chance is 0.1; with wrong labels it is lower
    manifest = json.loads((fleet.folder / "runs/run/artifact/manifest.json").read_text())
    assert manifest["model"]["class_names"] == words


@pytest.mark.e2e
@pytest.mark.parametrize("any_broker", ["embedded"], indirect=True)
def test_a_device_whose_class_is_renamed_in_a_round_is_waited_for_no_longer(
    processes, digits, any_broker
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=1, epochs=20)
    path = fleet.folder / "run.toml"
    path.write_text(path.read_text().replace("deadline_s = 1000.0", "deadline_s = 3600.0"))
    agent = fleet.folder / "agent-2.toml"
    agent.write_text(agent.read_text().replace(f"{digits}/", ""))
    same = dict(zip("0123456789", "0123456789", strict=True))
    renamed(digits / "device-2.npz", fleet.folder / "device-2.npz", same)
    fleet.start()
    processes.wait_for("training", lambda: fleet.reached("train", 1))
    processes.kill("agent-2")
    renamed(digits / "device-2.npz", fleet.folder / "device-2.npz", same | {"7": "seven"})
    fleet.agent(2)
    (entry,) = fleet.finish()["rounds"]
    verdicts = {name: device["accepted"] for name, device in entry["devices"].items()}
    assert verdicts == {"device-0": True, "device-1": True, "device-2": False}
    assert "a class is not known: 'seven'" in entry["devices"]["device-2"]["reason"]
