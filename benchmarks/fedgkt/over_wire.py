"""A run over MQTT instead of a simulation: Mosquitto, the orchestrator, one agent process a device.

    OUT/RUN-fleet/DEVICE.toml, DEVICE.log    an agent's settings and log; `state-DEVICE` beside them
    OUT/RUN-fleet/broker/                    Mosquitto's
    OUT/RUN-fleet/traffic.json               bytes that Mosquitto counted

Agents train by ONNX Runtime with one thread each, all at once. The run goes on after a stop.
"""

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.race import PATHS, ContenderError
from benchmarks.round_overhead.processes import Processes
from ondevice import config as agent
from orchestrator import broker
from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.launch import start
from wire.address import BrokerAddress
from wire.link import Arrived, Link, LinkEvent

COUNTERS = {
    "received": "$SYS/broker/bytes/received",
    "sent": "$SYS/broker/bytes/sent",
}
COUNTED_S = 60.0  # Mosquitto publishes its counters every 10 s


def run(config: RunConfig, shards: Path, changed: Callable[[Report], None]) -> None:
    """Do a run, from the start or from where it stopped.

    Args:
        config: of the run.
        shards: holds `device-*.npz`, one file a device.
        changed: called after each event.

    Raises:
        StillhouseError: what is wrong and what to do.
    """
    folder = fleet_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(config, admission="open", cohort=replace(config.cohort, deadline_s=7200.0))
    with (
        broker.start("mosquitto", folder=folder / "broker", fleet=config.fleet, port=0) as running,
        Processes(folder, PATHS) as processes,
        _counted(running.url, folder / "traffic.json"),
    ):
        for path in sorted(shards.glob("device-*.npz")):
            settings = {
                "device": path.stem,
                "fleet": config.fleet,
                "data": str(path.resolve()),
                "state": f"state-{path.stem}",
                "image": config.device.input,
                "threads": 1,
                "broker.url": running.url,
            }
            (folder / f"{path.stem}.toml").write_text(agent.template(settings))
            words = ("edge_agent.main", "run", "--config", f"{path.stem}.toml")
            processes.start(path.stem, [sys.executable, "-m", *words])

        def happened(report: Report) -> None:
            processes.check()
            changed(report)

        start.run(config, address=BrokerAddress(running.url, "", ""), changed=happened)


def fleet_folder(config: RunConfig) -> Path:
    """The folder of the agents and the broker."""
    return config.runs / f"{config.name}-fleet"


def traffic(config: RunConfig) -> dict[str, int]:
    """Bytes that Mosquitto has received and sent in this run so far, with all overhead of MQTT."""
    found: dict[str, int] = json.loads((fleet_folder(config) / "traffic.json").read_text())
    return found


@contextmanager
def _counted(url: str, path: Path) -> Iterator[None]:
    """After the block, add the broker's counters to those in a file."""
    try:
        yield
    finally:
        before = json.loads(path.read_text()) if path.exists() else dict.fromkeys(COUNTERS, 0)
        now = _counters(url)
        path.write_text(json.dumps({name: before[name] + now[name] for name in COUNTERS}))


def _counters(url: str) -> dict[str, int]:
    """The broker's counters, after it has published them once more than at our subscription."""
    seen: dict[str, list[int]] = {topic: [] for topic in COUNTERS.values()}
    enough = threading.Event()

    def take(event: LinkEvent) -> None:
        if isinstance(event, Arrived):
            seen[event.topic].append(int(event.payload))
            if min(map(len, seen.values())) > 1:
                enough.set()

    subscriptions = [(topic, 0) for topic in seen]
    link = Link(BrokerAddress(url), "counters", subscriptions=subscriptions, emit=take)
    link.start()
    try:
        if not enough.wait(COUNTED_S):
            raise ContenderError(f"the broker did not publish {', '.join(seen)} in {COUNTED_S} s")
    finally:
        link.close()
    return {name: seen[topic][-1] for name, topic in COUNTERS.items()}
