"""Stillhouse for one turn: a broker, agents and an orchestrator, each in a separate process.

The agents are `edge-agent run` with a configuration as `edge-agent init` writes it, and with their
journals. The orchestrator is `orchestrate`, which leaves out only training.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from benchmarks.race import PATHS
from benchmarks.round_overhead.memory import weigh
from benchmarks.round_overhead.processes import LIMIT_S, Processes
from benchmarks.round_overhead.turn import Plan, Turn
from orchestrator import broker
from orchestrator.fleet import certificates
from orchestrator.fleet.authority import Authority

SAMPLES = 8
RUN = """\
name = "run"
strategy = "fedavg"
rounds = {rounds}
heldout = "images.npz"
admission = "open"
[broker]
kind = "external"
url = "{url}"
{files}[cohort]
min_devices = {devices}
wait_s = 0.0
[device]
model = "caldas_cnn"
classes = 10
input = [1, 28, 28]
mean = [0.5]
std = [0.5]
batch = 10
[server]
eval_every = {rounds}
"""
AGENT = """\
device = "device-{number}"
fleet = "fleet"
data = "images.npz"
state = "state-{number}"
image = [1, 28, 28]
[broker]
url = "{url}"
{files}"""
FILES = """\
ca_file = "broker/ca.pem"
cert_file = "{name}.pem"
"""


class Fleet:
    """Stillhouse over one kind of broker.

    Args:
        kind: of the broker.
        artifact: the folder of the compiled training step; the first turn writes it.
        tls: whether it is mutual TLS.
    """

    def __init__(self, kind: broker.Kind, artifact: Path, *, tls: bool = False) -> None:
        self._kind: broker.Kind = kind
        self._artifact, self._tls = artifact, tls

    def __call__(self, plan: Plan, folder: Path) -> Turn:
        """Do a turn in an empty folder.

        Raises:
            ContenderError, BrokerError: the turn could not be done; the message says why.
        """
        run_artifact = folder / "runs" / "run" / "artifact"
        if self._artifact.exists():
            shutil.copytree(self._artifact, run_artifact)
        pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES, 28, 28, 1), np.uint8)
        np.savez(folder / "images.npz", x=pixels, y=np.arange(SAMPLES) % 10)
        certified = certificates.for_broker(folder, "fleet", "127.0.0.1") if self._tls else None
        if self._tls:
            ours = Authority(folder, "fleet")
            for name in ("orchestrator", *plan.names):
                (folder / f"{name}.pem").write_text(ours.client(name, 1))
        with (
            broker.start(
                self._kind, folder=folder / "broker", fleet="fleet", port=0, certificates=certified
            ) as running,
            Processes(folder, PATHS) as processes,
        ):
            turn = _play(plan, processes, running.url, FILES if self._tls else "")
        if not self._artifact.exists():
            shutil.copytree(run_artifact, self._artifact)
        return turn


def _play(plan: Plan, processes: Processes, url: str, files: str) -> Turn:
    folder, names = processes.folder, plan.names
    own_files = files.format(name="orchestrator")
    run = RUN.format(rounds=plan.rounds + 1, devices=plan.devices, url=url, files=own_files)
    (folder / "run.toml").write_text(run)
    agents = []
    for number, name in enumerate(names):
        text = AGENT.format(number=number, url=url, files=files.format(name=name))
        (folder / f"{name}.toml").write_text(text)
        command = ("edge_agent.main", "run", "--config", f"{name}.toml")
        agents.append(processes.start(name, [sys.executable, "-m", *command]))
    processes.wait(
        "connection", lambda: all(processes.says(name, "connected to") for name in names)
    )

    def start() -> int:
        command = ("benchmarks.round_overhead.orchestrate", "run.toml")
        return processes.start("orchestrator", [sys.executable, "-m", *command])

    def finish() -> None:
        limit_s = LIMIT_S * (plan.rounds + 1)
        processes.wait("end", lambda: processes.ended("orchestrator"), limit_s)

    weights = None
    if plan.weighed:
        weights = weigh(agents, start, finish)
    else:
        start()
        finish()
    rounds = json.loads((folder / "rounds.json").read_text())
    return Turn(**{key: tuple(values) for key, values in rounds.items()}, weights=weights)
