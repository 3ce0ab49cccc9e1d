"""The command `edge-agent`."""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from edge_agent import __version__, config
from wire.errors import SettingsError, StillhouseError

TEMPLATE = """\
# Configuration of one Stillhouse edge agent. Start it with: edge-agent run --config agent.toml

device = "device-0"     # the name it is enrolled under (orchestrator enroll)
fleet = "fleet"         # the fleet it belongs to
data = "images"         # an .npz with x (N, H, W, C) uint8 and y, or a folder, a sub-folder a class
state = "state"         # artifacts, weights and the journal; survives power cuts
image = [3, 32, 32]     # channels, height, width; a folder's images are brought to it
threads = 0             # of ONNX Runtime and numpy; 0 takes all cores
release_key = ""        # updates of the package are signed by it; "" takes none
update_minutes = 5      # that an update has to connect to the broker, or it is rolled back

[broker]
url = "mqtt://localhost:1883"   # mqtts:// with ca_file, and cert_file and key_file for mutual TLS
username = ""                   # with a password where the broker asks for one
password = ""
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="edge-agent", description=__doc__)
    parser.add_argument("--version", action="version", version=f"edge-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="join the fleet and work until stopped")
    run.add_argument("--config", type=Path, required=True, help="agent.toml")
    run.add_argument("--verbose", action="store_true", help="say more")
    doctor = commands.add_parser("doctor", help="look for what keeps this device from taking part")
    doctor.add_argument("--config", type=Path, default=Path("/etc/stillhouse/agent.toml"))
    measure = commands.add_parser("measure", help="what a training artifact costs on this device")
    measure.add_argument("--artifact", type=Path, required=True, help="folder of the artifact")
    measure.add_argument("--budget-mb", type=int, default=0,
                         help="for the largest batch; 0: what is available now")  # fmt: skip
    measure.add_argument("--json", type=Path, help="write all figures there")
    measure.add_argument("--threads", type=int, default=0, help="0 takes all cores")
    measure.add_argument("--steps", type=int, default=20, help="that are timed")
    init = commands.add_parser("init", help="write a commented configuration")
    init.add_argument("file", type=Path, nargs="?", default=Path("agent.toml"))
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "init":
            return _init(chosen.file)
        if chosen.command == "measure":
            return _measure(chosen)
        if chosen.command == "doctor":
            from edge_agent import doctor as doctoring

            return doctoring.report(chosen.config)
        return _run(chosen.config, verbose=chosen.verbose)
    except StillhouseError as fault:
        print(f"edge-agent: {fault}", file=sys.stderr)
        return 2


def _init(path: Path) -> int:
    try:
        with path.open("x") as file:
            file.write(TEMPLATE)
    except OSError as fault:
        print(f"edge-agent: {path}: {fault.strerror}; nothing was written", file=sys.stderr)
        return 2
    path.chmod(0o600)  # it will hold a password
    print(f"{path} written; edit it, then: edge-agent run --config {path}")
    return 0


def _measure(chosen: argparse.Namespace) -> int:
    from edge_agent import measure as measuring
    from wire.artifact import open_artifact

    if chosen.threads < 0 or chosen.steps < 1 or chosen.budget_mb < 0:
        raise SettingsError("expected --threads and --budget-mb of 0 or more, --steps of 1 or more")
    artifact = open_artifact(chosen.artifact)
    _hold_threads(chosen.threads)
    budget = chosen.budget_mb * 10**6
    report = measuring.measure(artifact, threads=chosen.threads, steps=chosen.steps, budget=budget)
    print(measuring.text(report))
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _run(path: Path, *, verbose: bool) -> int:
    from edge_agent.agent import serve

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
    )

    def install(stop: Callable[[], None]) -> None:
        signal.signal(signal.SIGTERM, lambda _number, _frame: stop())
        signal.signal(signal.SIGINT, lambda _number, _frame: stop())

    chosen = config.load(path)
    _hold_threads(chosen.threads)
    serve(chosen, install)
    return 0


def _hold_threads(number: int) -> None:
    """Let numpy's matrix products take so many threads; 0 leaves them all."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if number:
        threadpool_limits(number, user_api="blas")


if __name__ == "__main__":
    sys.exit(main())
