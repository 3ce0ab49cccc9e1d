"""A demonstration on one machine: a broker, an orchestrator, and each agent in its own process.

FedGKT runs first, with the devices' small network shared. Then the same agents train alone
(`local`), with the same number of local epochs: the floor that both models have to beat.
"""

import contextlib
import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

import models
from ondevice import config as agent
from orchestrator import datasets
from orchestrator.config import RunConfig
from orchestrator.display.report import Report
from orchestrator.fleet import enrolment
from orchestrator.launch import networks, prepare, start
from wire import stopping
from wire.address import BrokerAddress
from wire.errors import RunError

STOP_S = 20.0
ALONE = "-alone"  # ends the name of the run in which devices train alone


def free_name(runs: Path, name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... by which `play` finds no earlier run."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(n for n in names if not (runs / n).exists() and not (runs / (n + ALONE)).exists())


def play(
    config: RunConfig,
    alone: RunConfig | None,
    deal: Callable[[Path], datasets.Shards],
    changed: Callable[[Report], None],
) -> tuple[Report, Report | None]:
    """Run the demonstration; returns the reports of FedGKT and of the devices alone.

    If it fails before its first round, what it made is removed.

    Args:
        config: of the run with FedGKT; classes, shape and normalization are those of the images.
        alone: of the run in which each device trains alone; None leaves it out.
        deal: writes a shard of images for each device into a folder.
        changed: called after each event.

    Raises:
        StillhouseError: what is wrong and what to do.
    """
    if config.folder.exists():
        raise RunError(f"{config.folder} is there already; choose another --name")
    for name in (config.device.network, config.server.model):
        models.input_shape(name)  # raises if there is no such network
    made = [*prepare.absent(config), config.folder]
    try:
        return _play(config, alone, deal, changed)
    except BaseException:
        if not _began(config.folder / "status.json"):
            prepare.remove(made, config.runs)
        raise


def _began(status: Path) -> bool:
    try:
        return bool(json.loads(status.read_text())["round"])
    except (OSError, ValueError):
        return False


def _play(
    config: RunConfig,
    alone: RunConfig | None,
    deal: Callable[[Path], datasets.Shards],
    changed: Callable[[Report], None],
) -> tuple[Report, Report | None]:
    folder = config.folder / "data"
    cut = deal(folder)
    height, width, channels = cut.shape
    mean, std = _pixels(folder / cut.devices[0].file)
    shape = (channels, height, width)
    device = replace(config.device, classes=cut.classes, input=shape, mean=mean, std=std)
    heldout = folder / cut.heldout.file
    config = replace(config, heldout=heldout, device=device)
    networks.check(config)
    names = [Path(shard.file).stem for shard in cut.devices]
    passwords = {name: enrolment.enroll(config.runs, config.fleet, name) for name in names}
    prepare.check(config, prepare.read_heldout(config))
    with start.serve(config) as address, contextlib.ExitStack() as stack:
        agents = [
            stack.enter_context(_agent(config, address, name, passwords[name])) for name in names
        ]
        for process in agents:  # tells all agents to end before any is waited for
            stack.callback(process.terminate)
        taught = start.run(config, address=address, changed=changed, again="")
        if not alone:
            return taught, None
        alone = replace(alone, heldout=heldout, device=device)
        return taught, start.run(alone, address=address, changed=changed, again="")


def _pixels(shard: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a shard's pixels on the 0..1 scale, per channel."""
    with np.load(shard) as arrays:
        pixels = arrays["x"].astype(np.float32) / 255
    mean, std = (part(pixels, axis=(0, 1, 2)).astype(float) for part in (np.mean, np.std))
    return tuple(mean.round(4).tolist()), tuple(std.clip(1e-3).round(4).tolist())


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
