"""What is known of a fleet's devices: who they are, and what training costs on each.

    runs/born-FLEET/DEVICE.json          the last birth of each device, and when it came
    runs/measured-FLEET/DEVICE-UTC.json  measurements that devices signed (`edge-agent measure`),
                                         with the time of arrival
    runs/measured-FLEET/keys.json        the key with which each device signs

A device is known by the key of its first measurement (trust on first use). The broker vouches for
the sender's name, the key for its being the same device as the first time. The last `KEEP`
measurements of each device are kept.
"""

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.fleet import enrolment, files
from wire import measurement, records, storage
from wire.errors import RunError, SignatureError, WireError
from wire.measurement import Measurement
from wire.messages import Birth, Platform

log = logging.getLogger("orchestrator")

KEEP = 32
KEYS = "keys.json"
_REMEDY = "mend or remove it"
_MEASURED = re.compile(r"(.+)-\d{8}T\d{12}Z\.json")


@dataclass(frozen=True)
class Device:
    """One device: its last birth with the time (Unix seconds), and its last measurement, if any."""

    name: str
    birth: Birth | None
    born_at: float | None
    measured: Measurement | None

    @property
    def platform(self) -> Platform | None:
        """The machine, as the birth describes it, or else the measurement."""
        known = self.birth or self.measured
        return known.platform if known else None


def born(runs: Path, name: str, birth: Birth) -> None:
    """Keep a device's birth in the fleet `name`; if it cannot be written, only log that."""
    folder = runs / f"born-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{birth.device}.json"
        # Not synced: the next birth writes it anew, and thousands may come at once.
        partial = path.with_name(f"{path.name}.new")
        partial.write_bytes(_json({"at": time.time(), **records.plain(birth)}))
        partial.replace(path)
    except OSError as fault:
        log.warning("the birth of %s is not kept: %s", birth.device, fault)


def take(runs: Path, name: str, device: str, data: bytes) -> Path:
    """Keep a measurement that a device of the fleet `name` sent; return its file.

    Raises:
        WireError: it is not a measurement, or one of another device.
        SignatureError: it is not signed, or with another key than this device's measurements
            before.
        RunError: the list of keys is damaged.
    """
    report = measurement.verify(data, where=f"measurement of {device}")
    if report.name != device:
        raise WireError(
            f"measurement of {device}: expected the name {device!r} in it, got {report.name!r}; "
            "measure with this device's agent.toml"
        )
    folder = runs / f"measured-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    keys = files.read_table(folder / KEYS, _REMEDY)
    if keys.get(device, report.device) != report.device:
        raise SignatureError(
            f"{device}: expected a measurement signed by {keys[device]}, as its first one was, got "
            f"one by {report.device}; if its state folder was made anew, take {device!r} out of "
            f"{folder / KEYS}"
        )
    if device not in keys:
        storage.write(folder / KEYS, _json({**keys, device: report.device}))
    for path in _files(folder).get(device, []):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return path  # the broker delivered it again
    # The time is this machine's, because a Raspberry Pi's clock has no battery.
    path = folder / f"{device}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S%fZ')}.json"
    storage.write(path, data)
    for old in _files(folder).get(device, [])[:-KEEP]:
        old.unlink()
    return path


def known(runs: Path, name: str) -> list[Device]:
    """All devices of a fleet that are enrolled, have connected or were measured, by name.

    Raises:
        StillhouseError: a file is damaged; the message names it.
    """
    births = {path.stem: path for path in (runs / f"born-{name}").glob("*.json")}
    measured = _files(runs / f"measured-{name}")
    devices = []
    for device in sorted({*enrolment.enrolled(runs, name), *births, *measured}):
        birth, at = _birth(births[device]) if device in births else (None, None)
        devices.append(Device(device, birth, at, _last(measured.get(device, ()))))
    return devices


def _last(paths: Sequence[Path]) -> Measurement | None:
    """The newest measurement that can be read; files that cannot are logged and skipped."""
    for path in reversed(paths):
        try:
            return measurement.verify(path.read_bytes(), where=str(path))
        except (WireError, SignatureError) as fault:
            log.warning("%s", fault)
    return None


def _birth(path: Path) -> tuple[Birth, float]:
    content = files.read_table(path, _REMEDY)
    at = content.pop("at", None)
    if type(at) is not float:
        raise RunError(f"{path}: expected the time of a birth, got {at!r:.40}; remove the file")
    return records.build(Birth, content, where=str(path), error=RunError), at


def _files(folder: Path) -> dict[str, list[Path]]:
    """The measurements in a folder by device, oldest first."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if match := _MEASURED.fullmatch(path.name):
            files.setdefault(match[1], []).append(path)
    return files


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
