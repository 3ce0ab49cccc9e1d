"""README's blocks run as they are typed, in the order in which a newcomer types them.

Three things differ from the README, so that a test takes seconds: there are fewer images and
rounds, the server's network is smaller, and a free port replaces 1883. `pip install` is not run,
because its packages are installed already.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.config import RunConfig, presets, template
from tests.conftest import ROOT, Processes
from wire import records
from wire.errors import SettingsError

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
# The test's shell also gets the environment's programs, and a pip that installs nothing.
PRELUDE = """
pip() {{ echo "pip $*"; }}
edge-agent() {{
    case "$1" in init) set -- "$@" --set broker.url=mqtt://localhost:{port};; esac
    "{python}" -m edge_agent.main "$@"
}}
python() {{ "{python}" "$@"; }}
orchestrator() {{
    if [ "$1" = init ]; then
        for setting in broker.port={port} rounds={rounds} server.model=resnet10 cohort.wait_s=0; do
            # What README sets, it means.
            case "$*" in *" ${{setting%%=*}}="*) ;; *) set -- "$@" --set "$setting";; esac
        done
    fi
    "{python}" -m orchestrator.main "$@"
}}
set -e
"""
FEWER = {"--devices 2 --out": "--devices 2 --per-device 48 --held-out 60 --out"}


def blocks(title):
    """The indented blocks of one of README's sections."""
    section = re.split(rf"(?m)^#+ {re.escape(title)}$", README)[1]
    section = re.split(r"(?m)^#+ ", section)[0]
    found = re.findall(r"(?m)(?:^ {4}.*\n|^\n(?= {4}))+", section)
    return [re.sub(r"(?m)^ {4}", "", block).strip("\n") for block in found]


class Newcomer:
    """Types blocks into shells, in a folder of its own."""

    def __init__(self, processes: Processes, rounds: int = 2) -> None:
        self.processes, self.folder = processes, processes.folder
        with socket.create_server(("127.0.0.1", 0)) as trial:
            self.port = trial.getsockname()[1]
        self.prelude = PRELUDE.format(python=sys.executable, port=self.port, rounds=rounds)
        (self.folder / ".venv/bin").mkdir(parents=True)
        (self.folder / ".venv/bin/activate").touch()

    def script(self, block: str) -> str:
        """The block as it is run, made small."""
        for typed, small in FEWER.items():
            block = block.replace(typed, small)
        return self.prelude + block.replace("1883", str(self.port)).replace("SERVER", "127.0.0.1")

    def type(self, block: str) -> str:
        """Run a block to its end; return its output."""
        done = subprocess.run(
            ["bash", "-c", self.script(block)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
        return done.stdout

    def leave(self, name: str, block: str) -> None:
        """Run a block whose last command does not end; that one becomes a process of the test."""
        *before, last = block.splitlines()
        self.type("\n".join(before) or "true")
        module, *words = re.sub(r"\$N", name.rpartition("-")[2], last).split()
        module = {"orchestrator": "orchestrator.main", "edge-agent": "edge_agent.main"}[module]
        self.processes.start(name, module, *words)

    def wait_for_rounds(self, number: int) -> None:
        """Wait until this many rounds are done."""
        path = self.folder / "runs/first/status.json"

        def done() -> bool:
            assert self.processes.running["start"].poll() in (None, 0), self.processes.log("start")
            return path.exists() and len(json.loads(path.read_text())["history"]) >= number

        self.processes.wait_for(f"round {number}", done, 300.0)


def photos(folder: Path) -> None:
    """Make a device's folder of digits, with a sub-folder for each class."""
    draw = np.random.default_rng(0)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for number in range(4):
            pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")


@pytest.mark.e2e
def test_use_it_server_devices_and_what_it_costs(processes):
    newcomer = Newcomer(processes, rounds=100)  # the run lasts while the device measures
    start, after = blocks("1. On the server: the orchestrator")
    newcomer.leave("start", start)
    processes.wait_for(
        "who is awaited",
        lambda: "0 of at least 2 here; enrolled and not here: pi-3, pi-4" in processes.log("start"),
    )
    photos(newcomer.folder / "images")
    (agent,) = blocks("2. On each device: the agent")
    newcomer.leave("pi-3", agent)
    other = agent.replace("pi-3", "pi-4").splitlines()[-1]
    settings = newcomer.folder / "pi-4.toml"
    settings.write_text(settings.read_text().replace('"state"', '"state-4"'))
    newcomer.leave("pi-4", other)
    newcomer.wait_for_rounds(1)
    told = newcomer.type(after)
    assert "first  fedgkt  round" in told
    assert "model.onnx written: round" in told
    assert (newcomer.folder / "model.onnx").exists()
    on_device, on_server = blocks("3. In the field: what it costs")
    assert "submitted as pi-3" in newcomer.type(on_device)
    told = newcomer.type(on_server)
    assert "pi-3" in told
    assert "roofline.png written" in told


@pytest.mark.e2e
def test_on_one_machine_in_three_shells_and_the_simulation_of_the_same(processes):
    newcomer = Newcomer(processes)
    first, other = blocks("On one machine, in three shells")
    newcomer.leave("start", first)
    for n in range(2):
        newcomer.leave(f"device-{n}", other.replace("N=0", f"N={n}"))
    process = processes.running["start"]
    processes.wait_for("end of the run", lambda: process.poll() is not None, 300.0)
    assert process.returncode == 0, processes.log("start")
    assert (newcomer.folder / "runs/first/report.json").exists()

    toml, simulate = blocks("Weights instead of features: Federated Dropout")
    tomllib.loads(toml)
    newcomer.type("rm -r run.toml runs; orchestrator init . --preset dropout")
    told = newcomer.type(simulate)
    assert "round 2 of 2: server" in told


def test_your_own_network(processes):
    newcomer = Newcomer(processes)
    (newcomer.folder / "nets.py").write_text(
        "from torch import nn\n\n\ndef make(classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(4 * 16 * 16, classes))\n"
    )
    (block,) = blocks("Your own network")
    one, another = block.splitlines()
    newcomer.type(one)
    newcomer.type(another)


@pytest.mark.parametrize(
    "title", ["Feature maps, once", "Weights instead of features: Federated Dropout"]
)
def test_settings_are_those_of_a_run(title):
    shown = tomllib.loads(blocks(title)[0])
    whole = tomllib.loads(template("fedgkt"))  # without [transfer] and [submodel]
    for key, value in shown.items():
        whole[key] = {**whole.get(key, {}), **value} if isinstance(value, dict) else value
    records.build(RunConfig, whole, where="README", error=SettingsError)  # raises otherwise


def test_every_block_is_run_by_a_test_here():
    tested = {
        "Try it": 3,  # make demo, what it prints, make test
        "1. On the server: the orchestrator": 2,
        "2. On each device: the agent": 1,
        "3. In the field: what it costs": 2,
        "On one machine, in three shells": 2,
        "Feature maps, once": 1,
        "Weights instead of features: Federated Dropout": 2,
        "Your own network": 1,
    }
    titles = re.findall(r"(?m)^##+ (.*)$", README)
    found = {title: len(blocks(title)) for title in titles if blocks(title)}
    assert found == tested
    demo, _, test = blocks("Try it")
    targets = re.findall(r"(?m)^(\w+):", (ROOT / "Makefile").read_text())
    assert {demo, test} == {"make demo", "make test"}
    assert {"demo", "test"} <= set(targets)


def test_every_preset_is_named():
    for preset in presets():
        assert f"`{preset}`" in README or f"--preset {preset}" in README, preset
