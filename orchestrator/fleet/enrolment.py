"""Who belongs to a fleet: names and broker passwords, in one file that only its owner reads.

`runs/fleet-NAME.json` maps each enrolled device, and the orchestrator itself, to the password that
the broker asks for. Passwords are 32 random bytes, never chosen by people.
"""

import json
import secrets
import socket
from pathlib import Path

from orchestrator.broker import let_in
from orchestrator.config import BrokerConfig
from wire import address, storage, topics
from wire.errors import RunError, SettingsError

ORCHESTRATOR = "orchestrator"


def users(runs: Path, fleet: str) -> dict[str, str]:
    """Passwords by user name; the orchestrator's is made on first use.

    Raises:
        RunError: the file is damaged.
    """
    file = path(runs, fleet)
    try:
        known = json.loads(file.read_text())
    except FileNotFoundError:
        known = {}
    except ValueError as fault:
        raise RunError(
            f"{file}: not JSON: {fault}; restore it, or enroll the fleet anew"
        ) from fault
    if not isinstance(known, dict):
        raise RunError(
            f"{file}: expected names and passwords; restore it, or enroll the fleet anew"
        )
    if ORCHESTRATOR not in known:
        known[ORCHESTRATOR] = secrets.token_urlsafe(32)
        _write(file, known)
    return {str(name): str(password) for name, password in known.items()}


def enrolled(runs: Path, fleet: str) -> frozenset[str]:
    """The devices that are enrolled; none where nobody was.

    Raises:
        RunError: the file is damaged.
    """
    if not path(runs, fleet).exists():  # `users` would make it
        return frozenset()
    return frozenset(users(runs, fleet)) - {ORCHESTRATOR}


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
    known = users(runs, fleet) if path(runs, fleet).exists() else {}
    return known.get(device) or secrets.token_urlsafe(32)


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
    known = users(runs, fleet)
    if device not in known:
        known[device] = secret or secrets.token_urlsafe(32)
        _write(path(runs, fleet), known)
    let_in(broker_folder(runs, fleet), known)
    return known[device]


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
    if ours and endpoint.scheme == "mqtts":
        notes.append("the brokers that the orchestrator runs speak no TLS, and mqtts is TLS")
    elif endpoint.scheme == "mqtts":
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
    return f"mqtt://{host}:{broker.port or 1883}"


def is_empty(path: Path) -> bool:
    """Whether a fleet's file has no device."""
    return set(json.loads(path.read_text())) <= {ORCHESTRATOR}


def path(runs: Path, fleet: str) -> Path:
    """The file of a fleet."""
    return runs / f"fleet-{fleet}.json"


def broker_folder(runs: Path, fleet: str) -> Path:
    """Where a broker that we run for a fleet keeps its files."""
    return runs / f"broker-{fleet}"


def _write(path: Path, known: dict[str, str]) -> None:
    with storage.at(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, json.dumps(known, indent=1).encode(), 0o600)
