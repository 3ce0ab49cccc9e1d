"""Simulated devices: the images and the birth message of each."""

import hashlib
import logging
import platform
from collections.abc import Mapping
from pathlib import Path

import wire
from ondevice import images
from ondevice.images import ImageSet
from orchestrator.config import RunConfig
from orchestrator.fleet import classes
from orchestrator.fleet.classes import Classes
from wire import topics
from wire.errors import RunError
from wire.messages import MAX_COUNT, Birth, Platform

log = logging.getLogger("orchestrator")


def read_shards(
    config: RunConfig, folder: Path, settled: Classes | None = None
) -> dict[str, ImageSet]:
    """Each device's images, by its name, with the run's class numbers as labels.

    A device with a class that the run lacks is left out, as it would be refused over the wire.

    Args:
        config: of the run.
        folder: of the files.
        settled: the run's classes; None takes them from the configuration alone.

    Raises:
        RunError: fewer devices than a round needs, or a name is not valid for a device.
        DataError: a file does not fit the model.
    """
    settled = settled or classes.resolve(config)
    files = sorted(folder.glob("device-*.npz"))
    for file in files:
        try:
            topics.check_name(file.stem, "device name")
        except ValueError as fault:
            raise RunError(f"{file}: {fault}") from fault
    least = config.cohort.min_devices
    if len(files) < least:
        raise RunError(
            f"{folder}: expected {least} or more files device-*.npz, found {len(files)}; make them "
            "with python -m orchestrator.datasets"
        )
    found = {}
    for file in files:
        held = images.load(file, input_shape=config.device.input)
        if reason := settled.refusal(held.names):
            log.warning("%s is left out: %s", file.stem, reason)
            continue
        settled = settled.named_by(file.stem, held.names)
        found[file.stem] = held.labelled(settled.count, settled.artifact_names)
    if len(found) < least:
        raise RunError(
            f"{folder}: expected {least} or more devices with the run's classes, got {len(found)} "
            f"of {len(files)}; the warnings above name the others and the remedy"
        )
    return found


def digest(shards: Mapping[str, ImageSet]) -> str:
    """SHA-256 (hex) of all devices' images and labels."""
    each = {name: images.digest(held.x, held.y) for name, held in shards.items()}
    return hashlib.sha256("".join(f"{n}:{d}" for n, d in each.items()).encode()).hexdigest()


def birth(name: str, held: ImageSet) -> Birth:
    """A simulated device's birth message; its memory size means nothing."""
    machine = Platform("simulated", platform.machine(), 1, MAX_COUNT - 1, "", "")
    return Birth(name, 1, wire.__version__, len(held.y), held.digest, machine)
