"""What is known of a fleet's devices: who they are, and what training costs on each.

    runs/born-FLEET/DEVICE.json          the last birth of each device, and when it came
    runs/measured-FLEET/DEVICE-UTC.json  measurements that devices signed (`edge-agent measure`), as
                                         they came; the time is that of their coming
    runs/measured-FLEET/keys.json        the key that each device signs with

A device is believed by the key of its first measurement (trust on first use): the broker says who
speaks, the key that it is still the one who spoke first. Of each device the last `KEEP` are kept.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator.fleet import enrolment
from wire import measurement, records
from wire.errors import RunError, SignatureError, WireError
from wire.measurement import Measurement
from wire.messages import Birth, Platform

log = logging.getLogger("orchestrator")

KEEP = 32
KEYS = "keys.json"
_MEASURED = re.compile(r"(.+)-\d{8}T\d{12}Z\.json")


@dataclass(frozen=True)
class Device:
    """One device: its last birth (seconds since 1970) and measurement, where there are any."""

    name: str
    birth: Birth | None
    born_at: float | None
    measured: Measurement | None

    @property
    def platform(self) -> Platform | None:
        """The machine, by the birth or else the measurement."""
        known = self.birth or self.measured
        return known.platform if known else None


def born(runs: Path, name: str, birth: Birth) -> None:
    """Keep a device's birth; `name` is the fleet's. Rounds go on where that cannot be."""
    folder = runs / f"born-{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / f"{birth.device}.json", {"at": time.time(), **records.plain(birth)})
    except OSError as fault:
        log.warning("the birth of %s is not kept: %s", birth.device, fault)


def take(runs: Path, name: str, device: str, data: bytes) -> Path:
    """Keep a measurement that came from a device of the fleet `name`; the file it is in.

    Raises:
        WireError: it is no measurement, or one of another device.
        SignatureError: it is not signed, or not by the key that this device signed with before.
        RunError: the list of keys is damaged.
    """
    made = measurement.verify(data, where=f"measurement of {device}")
    if made.name != device:
        raise WireError(
            f"measurement of {device}: expected the name {device!r} in it, got {made.name!r}; "
            "measure with this device's agent.toml"
        )
    folder = runs / f"measured-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    keys = _keys(folder / KEYS)
    if keys.get(device, made.device) != made.device:
        raise SignatureError(
            f"{device}: expected a measurement signed by {keys[device]}, as its first one was, got "
            f"one by {made.device}; if its state folder was made anew, take {device!r} out of "
            f"{folder / KEYS}"
        )
    if device not in keys:
        _write(folder / KEYS, {**keys, device: made.device})
    for path in _files(folder).get(device, []):
        if path.stat().st_size == len(data) and path.read_bytes() == data:
            return path  # the broker gave it again
    # By this machine's clock: a Raspberry Pi has no battery for its own.
    path = folder / f"{device}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S%fZ')}.json"
    _replace(path, data)
    for old in _files(folder).get(device, [])[:-KEEP]:
        old.unlink()
    return path


def known(runs: Path, name: str) -> list[Device]:
    """All devices of a fleet that are enrolled, were born or were measured, by name.

    Raises:
        StillhouseError: a file is damaged; the message names it.
    """
    births = {path.stem: path for path in (runs / f"born-{name}").glob("*.json")}
    measured = _files(runs / f"measured-{name}")
    found = []
    for device in sorted({*enrolment.enrolled(runs, name), *births, *measured}):
        birth, at = _birth(births[device]) if device in births else (None, None)
        last = None
        if device in measured:
            last = _last(measured[device])
        found.append(Device(device, birth, at, last))
    return found


def _last(paths: Sequence[Path]) -> Measurement | None:
    """The newest measurement that can be read; what cannot is told, and stands in nobody's way."""
    for path in reversed(paths):
        try:
            return measurement.verify(path.read_bytes(), where=str(path))
        except (WireError, SignatureError) as fault:
            log.warning("%s", fault)
    return None


def _birth(path: Path) -> tuple[Birth, float]:
    content = _read(path)
    at = content.pop("at", None)
    if type(at) is not float:
        raise RunError(f"{path}: expected the time of a birth, got {at!r:.40}; remove the file")
    return records.build(Birth, content, where=str(path), error=RunError), at


def _files(folder: Path) -> dict[str, list[Path]]:
    """The measurements in a folder, by device; the oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.json")):
        if named := _MEASURED.fullmatch(path.name):
            found.setdefault(named[1], []).append(path)
    return found


def _keys(path: Path) -> dict[str, Any]:
    return _read(path) if path.exists() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as fault:
        raise RunError(f"{path}: not JSON: {fault}; mend or remove it") from fault
    if not isinstance(content, dict):
        raise RunError(f"{path}: expected a table, got {type(content).__name__}; mend or remove it")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    _replace(path, (json.dumps(content, indent=1) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    """Replace a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.new")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
