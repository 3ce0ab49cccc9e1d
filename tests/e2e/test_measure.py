"""A measurement reaches the orchestrator, and does not disturb the run."""

import json
import os
import queue
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from orchestrator import broker
from tests.conftest import ROOT, Processes
from tests.e2e.test_run import Fleet, check_every_round_counts_each_device_once
from tools.export import export
from wire import measurement, messages, topics
from wire.address import BrokerAddress
from wire.link import Arrived, Link
from wire.messages import Measured

NOWHERE = "mqtt://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    out = tmp_path_factory.mktemp("measure") / "artifact"
    torch.manual_seed(0)
    model = models.build("resnet8", classes=4, input_shape=(3, 8, 8))
    export(model, name="resnet8", classes=4, input_shape=(3, 8, 8), batch=4, out=out)
    return out


def submit(folder: Path, artifact: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `edge-agent measure --submit`."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.main", "measure", "--artifact", str(artifact),
         "--threads", "1", "--steps", "1", "--submit", *more],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def kept_by_the_broker(url: str) -> list[Measured]:
    """The measurements that are retained under device-0."""
    events: queue.SimpleQueue = queue.SimpleQueue()
    own, marker = (topics.topic("fleet", name, "telemetry") for name in ("device-0", "marker"))
    link = Link(BrokerAddress(url), "reader", subscriptions=[(own, 1), (marker, 1)],
                emit=events.put)  # fmt: skip
    link.start()
    try:
        assert link.wait_connected(60.0)
        link.publish(marker, b"what is retained came before")
        found = []
        while (event := events.get(timeout=60.0)) != Arrived(
            marker, b"what is retained came before"
        ):
            if isinstance(event, Arrived):
                found.append(messages.decode(event.payload, sender="broker")[0])
        return [message for message in found if isinstance(message, Measured)]
    finally:
        link.close()


@pytest.mark.e2e
def test_a_report_is_kept_until_the_orchestrator_is_there_and_receipted_while_the_agent_is_there(
    processes: Processes, digits, any_broker, artifact
):
    fleet = Fleet(processes, digits, any_broker.url, rounds=2)
    kept = processes.folder / "runs/measured-fleet"
    early = ["--config", "agent-0.toml", "--json", "early.json", "--timeout", "2"]
    code, told, error = submit(processes.folder, artifact, *early)
    assert (code, error.count("\n")) == (2, 1)
    assert "no receipt in 2 s: no orchestrator of fleet 'fleet' is at work" in error
    assert "signed    by ed25519:" in told
    assert [message.device for message in kept_by_the_broker(any_broker.url)] == ["device-0"]

    fleet.orchestrator()
    fleet.agent(0)
    fleet.agent(1)  # a round begins with three, so the run waits
    born = processes.folder / "runs/born-fleet/device-0.json"
    processes.wait_for("device 0 at the orchestrator", born.exists)
    processes.wait_for("the report that the broker kept", lambda: any(kept.glob("device-0-*.json")))
    late = ["--config", "agent-0.toml", "--json", "late.json"]
    code, told, error = submit(processes.folder, artifact, *late)
    assert (code, error) == (0, "")
    assert "submitted as device-0 to the orchestrator of fleet fleet" in told
    sent = [processes.folder / name for name in ("early.json", "late.json")]
    found, signed = (
        {measurement.verify(path.read_bytes(), where=path.name).signature for path in paths}
        for paths in (kept.glob("device-0-*.json"), sent)
    )
    assert found == signed

    (processes.folder / "state-0/device.pem").unlink()
    code, _, error = submit(processes.folder, artifact, "--config", "agent-0.toml")
    assert code == 2
    assert "the orchestrator refuses the report: device-0: expected a measurement signed" in error

    fleet.agent(2)
    report = fleet.finish()
    check_every_round_counts_each_device_once(report, 2)
    for n in range(3):
        log = processes.log(f"agent-{n}")
        assert log.count("connected to") == 1  # nobody took over its session
        assert "trying again" not in log
    assert "message dropped" not in processes.log("run")
    assert kept_by_the_broker(any_broker.url) == []
    shown = subprocess.run(
        [sys.executable, "-m", "orchestrator.main", "devices", "--config", "run.toml",
         "--markdown"],
        cwd=processes.folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert [row.split(" | ")[0] for row in shown[2:]] == ["| device-0", "| device-1", "| device-2"]
    assert json.loads((processes.folder / "runs/born-fleet/device-1.json").read_text())


@pytest.mark.e2e
def test_what_keeps_a_report_from_the_orchestrator_is_one_line(processes, digits, artifact):
    Fleet(processes, digits, NOWHERE)
    near = ["--config", "agent-0.toml", "--timeout", "1"]
    code, _, error = submit(processes.folder, artifact, *near)
    assert (code, error.count("\n")) == (2, 1)
    assert f"broker {NOWHERE} cannot be reached" in error
    if broker.find() is None:
        pytest.skip("mosquitto is not installed: sudo apt install mosquitto")
    users = {"device-0": "right"}
    with broker.start("mosquitto", folder=processes.folder / "broker", fleet="fleet", port=0,
                      users=users) as running:  # fmt: skip
        kit = processes.folder / "agent-0.toml"
        text = kit.read_text().replace(NOWHERE, running.url)
        kit.write_text(f'{text}username = "device-0"\npassword = "wrong"\n')
        code, _, error = submit(processes.folder, artifact, "--config", "agent-0.toml")
    assert (code, error.count("\n")) == (5, 1)
    assert "check username, password and certificate" in error
