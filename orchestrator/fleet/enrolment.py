"""Who belongs to a fleet: names and broker passwords, in one file that only its owner reads.

`runs/fleet-NAME.json` maps each enrolled device, and the orchestrator itself, to the password that
the broker asks for. Passwords are 32 random bytes, never chosen by people.
"""

import json
import secrets
import socket
from pathlib import Path

from orchestrator.broker import access, let_in
from orchestrator.config import BrokerConfig
from orchestrator.fleet import files
from wire import address, storage, topics
from wire.address import PORTS
from wire.errors import RunError, SettingsError

ORCHESTRATOR = access.ORCHESTRATOR


def users(runs: Path, fleet: str) -> dict[str, str]:
    """Passwords by user name; the orchestrator's is made on first use.

    Raises:
        RunError: the file is damaged.
    """
    known = _read(path(runs, fleet))
    return known if ORCHESTRATOR in known else _add(runs, fleet, ORCHESTRATOR)


def enrolled(runs: Path, fleet: str) -> frozenset[str]:
    """The devices that are enrolled; none where nobody was.

    Raises:
        RunError: the file is damaged.
    """
    return frozenset(_read(path(runs, fleet))) - {ORCHESTRATOR}


def check_name(device: str) -> None:
    """Return if a device can have the name.

    Raises:
        RunError: the name cannot stand in a topic.
    """
    try:
        topics.check_name(device, "device name")
    except ValueError as fault:
        raise RunError(str(fault)) from fault


def password(runs: Path, fleet: str, device: str) -> str:
    """The password of a device: that which it has, or a new one, which nobody knows yet.

    Raises:
        RunError: the fleet's file is damaged.
    """
    return _read(path(runs, fleet)).get(device) or secrets.token_urlsafe(32)


def enroll(runs: Path, fleet: str, device: str, secret: str = "") -> str:
    """Add a device; returns its password. One that is known keeps the password it has.

    A broker of ours that runs lets the device in, within a second.

    Args:
        runs: folder of all runs.
        fleet: its name.
        device: its name.
        secret: its password, if it is new; "" draws one.

    Raises:
        RunError: the name cannot stand in a topic.
    """
    check_name(device)
    return _add(runs, fleet, device, secret)[device]


def check(runs: Path, fleet: str, device: str) -> None:
    """Return if a device is enrolled.

    Raises:
        RunError: it is not.
    """
    check_name(device)
    if device not in (known := enrolled(runs, fleet)):
        names = ", ".join(sorted(known)) or "nobody"
        raise RunError(f"device {device!r} is not enrolled in fleet {fleet!r}; {names} is")


def revoke(runs: Path, fleet: str, device: str) -> None:
    """Remove a device: a broker of ours ends its connection, and a run refuses what it sends.

    If it is enrolled again, it gets another password.

    Raises:
        RunError: no such device is enrolled.
    """
    check(runs, fleet, device)
    file = path(runs, fleet)
    with files.alone(runs):
        known = _read(file)
        known.pop(device, None)
        _write(file, known)
        let_in(broker_folder(runs, fleet), known)


def reach(broker: BrokerConfig, url: str, option: str = "--url") -> tuple[str, list[str]]:
    """The URL by which a device reaches a run's broker, and what a person should know of it.

    Args:
        broker: of the run.
        url: that was given for the device; "" takes what the settings say.
        option: what it was given by, for messages; ends in `url`.

    Raises:
        SettingsError: it is no broker's URL, or none is given and the settings say none.
    """
    ours = broker.kind != "external"
    if not url:
        url = broker.device_url
    if not url:
        listens = "every address of this machine" if broker.everywhere else "a port drawn at random"
        raise SettingsError(
            f"--url is missing: the broker listens on {listens}, so these settings do not say how "
            f"the device reaches it; --url {_example(broker)}, say"
        )
    try:
        endpoint = address.parse(url)
    except ValueError as fault:
        raise SettingsError(f"{option.removesuffix('url')}{fault}") from fault
    notes = []
    if ours and broker.local:
        notes.append(
            f"the broker of these settings listens on {broker.host}, for this machine only. For a "
            'device elsewhere write kind = "mosquitto" and host = "0.0.0.0" under [broker], and '
            f"enroll it with --url {_example(broker)}"
        )
    elif address.is_local(endpoint.host):
        notes.append(f"{endpoint.url} reaches the broker from its own machine only")
    if ours and endpoint.scheme != broker.scheme:
        raise SettingsError(
            f"{option.removesuffix('url')}url {endpoint.url}: the broker of these settings speaks "
            f"{'' if broker.mutual_tls else 'no '}TLS; write {_example(broker)}, say"
        )
    if not ours and endpoint.scheme == "mqtts":
        notes.append(
            "if an authority of your own signed the broker's certificate, name its PEM file as "
            "ca_file under [broker] of the device's settings"
        )
    return endpoint.url, notes


def _example(broker: BrokerConfig) -> str:
    try:
        host = address.check_host(socket.gethostname())
    except ValueError:
        host = "SERVER"
    return f"{broker.scheme}://{host}:{broker.listens_on or PORTS[broker.scheme]}"


def is_empty(path: Path) -> bool:
    """Whether a fleet's file has no device."""
    return _read(path).keys() <= {ORCHESTRATOR}


def path(runs: Path, fleet: str) -> Path:
    """The file of a fleet."""
    return runs / f"fleet-{fleet}.json"


def broker_folder(runs: Path, fleet: str) -> Path:
    """Where a broker that we run for a fleet keeps its files."""
    return runs / f"broker-{fleet}"


def _add(runs: Path, fleet: str, user: str, secret: str = "") -> dict[str, str]:
    """Add a user, and the orchestrator; returns all passwords, which our broker then knows.

    One process does so at a time: two devices may be enrolled at once, and both are to stay.
    """
    file = path(runs, fleet)
    with files.alone(runs):
        known = _read(file)
        for name, password in ((ORCHESTRATOR, ""), (user, secret)):
            if name not in known:
                known[name] = password or secrets.token_urlsafe(32)
                _write(file, known)
        let_in(broker_folder(runs, fleet), known)
    return known


def _read(file: Path) -> dict[str, str]:
    known = files.read_table(file, "restore it, or enroll the fleet anew")
    return {name: str(password) for name, password in known.items()}


def _write(path: Path, known: dict[str, str]) -> None:
    with storage.at(path):
        storage.write(path, json.dumps(known, indent=1).encode(), 0o600)
