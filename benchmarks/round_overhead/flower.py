"""Flower for one turn: a SuperLink and SuperNodes, started as its documentation says.

They keep state in memory, and talk over loopback without TLS. A SuperNode starts a separate process
for each message to its ClientApp (isolation "subprocess", the default). The app is `flower_app`.
"""

import json
import os
import shutil
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.round_overhead.memory import weigh
from benchmarks.round_overhead.processes import LIMIT_S, Processes
from benchmarks.round_overhead.turn import SHAPES, Plan, Turn
from benchmarks.train_step.environment import call

REQUIREMENTS = ("flwr==1.41.0",)
APP = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "round-overhead"
version = "1.0.0"
description = "Arrays that come back at once"
license = "Apache-2.0"
dependencies = ["{requirement}"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "stillhouse"
[tool.flwr.app.components]
serverapp = "flower_app:server"
clientapp = "flower_app:client"
[tool.flwr.app.config]
devices = {devices}
rounds = {rounds}
shapes = "{shapes}"
out = "{out}"
"""
CONNECTION = """\
[superlink]
default = "here"
[superlink.here]
address = "{address}"
insecure = true
"""


def environment(cache: Path) -> Path:
    """The folder of programs in Flower's virtual environment, which is created once.

    Raises:
        ContenderError: it cannot be created; the message says why.
    """
    folder = cache / "flower"
    mark, wanted = folder / "complete.txt", "\n".join(REQUIREMENTS)
    if not (mark.exists() and mark.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        call([sys.executable, "-m", "venv", str(folder)])
        call([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS])
        mark.write_text(wanted)
    return folder / "bin"


class Flower:
    """Flower's deployment, from the environment that `environment` creates."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs

    def __call__(self, plan: Plan, folder: Path) -> Turn:
        """Do a turn in an empty folder.

        Raises:
            ContenderError: the turn could not be done; the message says why.
        """
        link, *ports = _free_ports(plan.devices + 1)
        address, out = f"127.0.0.1:{link}", folder / "rounds.json"
        app, home = folder / "app", folder / "home"
        app.mkdir()
        home.mkdir()
        (home / "config.toml").write_text(CONNECTION.format(address=address))
        shutil.copy(Path(__file__).with_name("flower_app.py"), app)
        text = APP.format(
            requirement=REQUIREMENTS[0], devices=plan.devices, rounds=plan.rounds + 1,
            shapes=json.dumps(SHAPES), out=out,
        )  # fmt: skip
        (app / "pyproject.toml").write_text(text)
        settings = {
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": "",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
        }
        with Processes(folder, settings) as processes:
            local = ("--insecure", "--host", "127.0.0.1")
            here = ("--disable-runtime-dependency-installation", "--port", str(link))
            server = processes.start("superlink", ["flower-superlink", *local, *here])
            processes.wait("SuperLink", lambda: _listens(link))
            nodes = []
            for number, port in enumerate(ports):
                node = ("--port", str(port), "--node-config", f"partition-id={number}")
                command = ["flower-supernode", *local, *node, "--superlink", address]
                nodes.append(processes.start(f"supernode-{number}", command))
            names = [f"supernode-{number}" for number in range(plan.devices)]
            processes.wait(
                "SuperNodes",
                lambda: all(processes.says(n, "Starting Flower SuperExec") for n in names),
            )

            def start() -> int:
                processes.start("run", ["flwr", "run", str(app), "here"])
                return server

            def finish() -> None:
                processes.wait("end", out.exists, LIMIT_S * (plan.rounds + 1))

            weights = None
            if plan.weighed:
                weights = weigh(nodes, start, finish)
            else:
                start()
                finish()
        rounds = json.loads(out.read_text())
        return Turn(tuple(rounds["seconds"]), tuple(rounds["returned"]), weights=weights)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [int(free.getsockname()[1]) for free in sockets]


def _listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0
