"""A fleet on mutual TLS: kits, joining, renewal, and devices that are turned out."""

import stat
from pathlib import Path

import pytest

from edge_agent.main import REFUSED
from orchestrator import broker
from tests.conftest import Processes, free_port

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(broker.find() is None, reason="mosquitto is not installed"),
]

RUN = """\
name = "run"
fleet = "barn"
strategy = "fedavg"
rounds = {rounds}
heldout = "{digits}/heldout.npz"
[broker]
kind = "mosquitto"
port = {port}
tls = true
{more}
[cohort]
min_devices = 2
wait_s = 0.0
deadline_s = 1000.0
[device]
model = "resnet4"
batch = 16
lr = 0.02
"""


class Fleet:
    """A fleet whose broker, run by the orchestrator, speaks mutual TLS."""

    def __init__(
        self, processes: Processes, digits: Path, rounds: int, more: str = "", *, devices: int = 2
    ) -> None:
        self.processes, self.folder = processes, processes.folder
        self.port, self.digits = free_port(), digits
        text = RUN.format(digits=digits, port=self.port, rounds=rounds, more=more)
        (self.folder / "run.toml").write_text(text)
        for n in range(devices):
            self.enroll(n)

    def enroll(self, n: int, out: str = "") -> None:
        self.command(
            "enroll", f"pi-{n}", "--out", out or f"pi-{n}.toml", "--url",
            f"mqtts://localhost:{self.port}", "--set", f"data={self.digits}/device-{n}.npz",
            "--set", f"state=state-{n}", "--set", "threads=1",
        )  # fmt: skip

    def command(self, name: str, *arguments: str) -> None:
        made = self.processes.start(
            name, "orchestrator.main", name, *arguments, "--config", "run.toml"
        )
        assert made.wait(120) == 0, self.processes.log(name)

    def orchestrator(self) -> None:
        self.processes.start("run", "orchestrator.main", "start", "--config", "run.toml")

    def agent(self, n: int, kit: str = "", name: str = "") -> None:
        kit = kit or f"pi-{n}.toml"
        self.processes.start(name or f"pi-{n}", "edge_agent.main", "run", "--config", kit)

    def said(self, name: str, text: str) -> None:
        self.processes.wait_for(text, lambda: text in self.processes.log(name), 120)


def test_devices_get_certificates_for_keys_of_their_own_and_do_a_run(processes, digits):
    fleet = Fleet(processes, digits, 2)
    fleet.agent(0)  # before there is a broker
    fleet.said("pi-0", "asking the orchestrator for one")
    fleet.orchestrator()
    fleet.agent(1)
    assert processes.running["run"].wait(400) == 0, processes.log("run")
    for n in range(2):
        held = processes.folder / f"state-{n}" / "identity" / "device.pem"
        assert stat.S_IMODE(held.stat().st_mode) == 0o600
        key = held.read_text().partition("-----END CERTIFICATE-----")[2].strip()
        everywhere = [p for p in processes.folder.rglob("*") if p.is_file() and p != held]
        assert not [p for p in everywhere if key.encode() in p.read_bytes()]


def test_a_card_is_stolen_a_certificate_renewed_and_a_device_turned_out_while_a_run_goes_on(
    processes, digits
):
    fleet = Fleet(processes, digits, 1000, devices=3)
    fleet.orchestrator()
    for n in range(3):
        fleet.agent(n)
    fleet.said("run", ": 3 devices")

    # A kit that was used is worth nothing on another card.
    kit = (processes.folder / "pi-0.toml").read_text()
    (processes.folder / "stolen.toml").write_text(kit.replace("state-0", "state-9"))
    fleet.agent(0, "stolen.toml", "thief")
    assert processes.running["thief"].wait(120) == REFUSED
    assert "the kit of 'pi-0' was used before, with another key" in processes.log("thief")
    assert "pi-0:join gets no certificate" in processes.log("run")

    # A renewed certificate is used at the next connection.
    held = processes.folder / "state-0" / "identity" / "device.pem"
    before = held.read_bytes()
    fleet.command("renew", "pi-0")
    fleet.said("pi-0", "this device has a new certificate")
    assert held.read_bytes() != before
    processes.running["pi-0"].terminate()
    processes.running["pi-0"].wait(60)
    connections = processes.log("pi-0").count("connected to")
    fleet.agent(0)
    processes.wait_for(
        "pi-0 again", lambda: processes.log("pi-0").count("connected to") > connections, 120
    )

    # A revoked device is off, and the others go on; with a new kit it is back.
    fleet.command("revoke", "pi-2")
    fleet.said("pi-2", "it is revoked; enroll the device again")
    fleet.said("run", ": 2 devices")
    processes.running["pi-2"].terminate()
    processes.running["pi-2"].wait(60)
    fleet.enroll(2, "again.toml")
    fleet.agent(2, "again.toml", "back")
    fleet.said("back", "this device has its certificate")
    rounds = processes.log("run").count(": 3 devices")
    processes.wait_for("its round", lambda: processes.log("run").count(": 3 devices") > rounds)
