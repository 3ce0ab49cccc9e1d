"""A demonstration on one machine: a broker, an orchestrator, and each agent in its own process.

FedGKT runs first, with the devices' small network shared. Then the same agents train alone
(`local`), with the same number of local epochs: the floor that both models have to beat.
"""

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import models
from ondevice import config as agent
from orchestrator import datasets
from orchestrator.config import (
    BrokerConfig,
    CohortConfig,
    DeviceConfig,
    RunConfig,
    ServerConfig,
    TransferConfig,
)
from orchestrator.display.report import Report
from orchestrator.fleet import claim, enrolment
from orchestrator.launch import networks, prepare, start
from wire import stopping
from wire.address import BrokerAddress
from wire.errors import RunError
from wire.names import anchored

STOP_S = 20.0


@dataclass(frozen=True)
class Plan:
    """What the demonstration does; see `orchestrator demo --help`."""

    source: str
    heldout: Path | None
    devices: int
    per_device: int | None
    heldout_samples: int | None
    split: datasets.Split
    alpha: float
    rounds: int
    server: ServerConfig
    device: DeviceConfig
    broker: BrokerConfig
    runs: Path
    name: str
    seed: int
    floor: bool
    size: tuple[int, int] | None = None


def free_name(runs: Path, name: str) -> str:
    """`name`, or the first free one of `name-2`, `name-3`, ... if a run has that name."""
    number = 1
    while (runs / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return name if number == 1 else f"{name}-{number}"


def play(plan: Plan, changed: Callable[[Report], None]) -> tuple[Report, Report | None]:
    """Run the demonstration; returns the reports of FedGKT and of the devices alone.

    The second is None without `plan.floor`.

    Raises:
        StillhouseError: what is wrong and what to do.
    """
    folder = plan.runs / plan.name
    if folder.exists():
        raise RunError(f"{folder} is there already; choose another --name")
    device = replace(plan.device, model=anchored(plan.device.model, Path()))
    server = replace(plan.server, model=anchored(plan.server.model, Path()))
    for name in (device.network, server.model):
        models.input_shape(name)  # raises if there is no such network
    with _nothing_left(plan.runs, plan.name):
        return _play(replace(plan, device=device, server=server), folder, changed)


@contextlib.contextmanager
def _nothing_left(runs: Path, name: str) -> Iterator[None]:
    """If the demonstration fails before its first round, remove what it made."""
    fleet, folder = enrolment.path(runs, name), runs / name
    lock, broker = claim.lock_file(runs, name), enrolment.broker_folder(runs, name)
    made = [path for path in (fleet, lock, broker, folder) if not path.exists()]
    fresh = not runs.exists()
    try:
        yield
    except BaseException:
        if not _began(folder / "status.json"):
            for path in made:
                if path in (fleet, lock):
                    path.unlink(missing_ok=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            if fresh:
                with contextlib.suppress(OSError):
                    runs.rmdir()
        raise


def _began(status: Path) -> bool:
    try:
        return bool(json.loads(status.read_text())["round"])
    except (OSError, ValueError):
        return False


def _play(
    plan: Plan, folder: Path, changed: Callable[[Report], None]
) -> tuple[Report, Report | None]:
    cut = datasets.build(
        plan.source,
        folder / "data",
        devices=plan.devices,
        per_device=plan.per_device,
        split=plan.split,
        alpha=plan.alpha,
        seed=plan.seed,
        size=plan.size,
        heldout=plan.heldout,
        heldout_samples=plan.heldout_samples,
    )
    height, width, channels = cut.shape
    mean, std = _pixels(folder / "data" / cut.devices[0].file)
    shape = (channels, height, width)
    device = replace(plan.device, classes=cut.classes, input=shape, mean=mean, std=std)
    config = RunConfig(
        name=plan.name,
        heldout=folder / "data" / "heldout.npz",
        fleet=plan.name,
        strategy="fedgkt",
        rounds=plan.rounds,
        runs=plan.runs,
        seed=plan.seed,
        broker=plan.broker,
        cohort=CohortConfig(min_devices=plan.devices, wait_s=0.0, deadline_s=3600.0),
        device=device,
        server=plan.server,
        transfer=TransferConfig(extractor="shared", network="shared"),
    )
    networks.check(config)
    names = [f"device-{number}" for number in range(plan.devices)]
    passwords = {name: enrolment.enroll(plan.runs, config.fleet, name) for name in names}
    prepare.check(config, prepare.read_heldout(config))
    with start.serve(config) as address, contextlib.ExitStack() as stack:
        agents = [
            stack.enter_context(_agent(config, address, name, passwords[name])) for name in names
        ]
        for agent in agents:  # tells all agents to end before any is waited for
            stack.callback(agent.terminate)
        taught = start.run(config, address=address, changed=changed, again="")
        if not plan.floor:
            return taught, None
        alone = replace(
            config, name=f"{plan.name}-alone", strategy="local", transfer=TransferConfig()
        )
        return taught, start.run(alone, address=address, changed=changed, again="")


def _pixels(shard: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a shard's pixels on the 0..1 scale, per channel."""
    with np.load(shard) as arrays:
        pixels = arrays["x"].astype(np.float32) / 255
    mean, std = pixels.mean(axis=(0, 1, 2)), pixels.std(axis=(0, 1, 2))
    return (
        tuple(round(float(m), 4) for m in mean),
        tuple(round(max(float(s), 1e-3), 4) for s in std),
    )


@contextlib.contextmanager
def _agent(
    config: RunConfig, address: BrokerAddress, name: str, password: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """One agent process; its log is in `agents/NAME/agent.log` of the run's folder."""
    folder = (config.folder / "agents" / name).resolve()
    folder.mkdir(parents=True)
    text = agent.template(
        {
            "device": name,
            "fleet": config.fleet,
            "data": str((config.folder / "data" / f"{name}.npz").resolve()),
            "state": str(folder / "state"),
            "image": config.device.input,
            "threads": 1,
            "broker.url": address.url,
            "broker.username": name,
            "broker.password": password,
        }
    )
    settings = folder / "agent.toml"
    settings.touch(0o600)
    settings.write_text(text)
    with (folder / "agent.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "edge_agent.main", "run", "--config", str(settings)],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            with stopping.ends_with_us(process):
                yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                logging.getLogger("orchestrator").warning("%s does not end; killing it", name)
                process.kill()
                process.wait()
