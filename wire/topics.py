"""MQTT topics: `stillhouse/1/<fleet>/<device>/<channel>`.

The device's name is always at the same level, so that a broker's access list can be one pattern. A
device writes `birth`, `death` (both retained), `result`, `telemetry` (where a measurement is
retained until the orchestrator has it), `up` and `sign`. It reads `down` and `order`. `up` and
`down` carry blobs; `order` also carries receipts, updates, certificates and a hello to one device.
The reserved name `all` stands for all devices: each reads `all/hello`. Under `all/run`
orchestrators talk to each other.

Before a device has a certificate, it is the user `DEVICE:join`, whose name stands in the device's
place: it writes `sign`, a request for a certificate, and reads the answer under `order`.
"""

import re
from typing import NamedTuple

from wire.errors import WireError

ROOT = "stillhouse/1"
ALL = "all"
FROM_DEVICE = ("birth", "death", "result", "telemetry", "up", "sign")
TO_DEVICE = ("order", "down")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RESERVED = (ALL, "orchestrator")
_JOIN = ":join"  # no device's name has a colon


class Address(NamedTuple):
    """The parts of a topic."""

    fleet: str
    device: str
    channel: str


def check_name(name: str, what: str) -> str:
    """Return `name` if a topic, a file name and a certificate may hold it.

    Raises:
        ValueError: they may not.
    """
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(
            f"{what} {name!r}: use 1 to 64 letters, digits, '.', '_' or '-', beginning with a "
            f"letter or digit, and none of the reserved {', '.join(_RESERVED)}"
        )
    return name


def joining(device: str) -> str:
    """The user that a device is until it has a certificate."""
    return device + _JOIN


def joined(user: str) -> str:
    """The device that a user is, or will be."""
    return user.removesuffix(_JOIN)


def topic(fleet: str, device: str, channel: str) -> str:
    """The topic of one device's channel (`device` may be `ALL` or the wildcard `+`)."""
    return f"{ROOT}/{fleet}/{device}/{channel}"


def parse(text: str) -> Address:
    """The parts of a topic.

    Raises:
        WireError: it is not one of our topics.
    """
    parts = text.split("/")
    if len(parts) != 5 or "/".join(parts[:2]) != ROOT:
        raise WireError(f"topic {text!r}: expected {ROOT}/<fleet>/<device>/<channel>")
    return Address(*parts[2:])
