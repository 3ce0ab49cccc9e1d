"""Who belongs to a fleet: names and broker passwords, in one file that only its owner reads.

`runs/fleet-NAME.json` maps each enrolled device, and the orchestrator itself, to the password that
the broker asks for. Passwords are 32 random bytes, never chosen by people.
"""

import json
import os
import secrets
from pathlib import Path

from wire import topics
from wire.errors import RunError

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


def enroll(runs: Path, fleet: str, device: str) -> str:
    """Add a device; returns its password. One that is known keeps the password it has.

    Raises:
        RunError: the name cannot stand in a topic.
    """
    try:
        topics.check_name(device, "device name")
    except ValueError as fault:
        raise RunError(str(fault)) from fault
    known = users(runs, fleet)
    if device not in known:
        known[device] = secrets.token_urlsafe(32)
        _write(path(runs, fleet), known)
    return known[device]


def is_empty(path: Path) -> bool:
    """Whether a fleet's file has no device."""
    return set(json.loads(path.read_text())) <= {ORCHESTRATOR}


def path(runs: Path, fleet: str) -> Path:
    """The file of a fleet."""
    return runs / f"fleet-{fleet}.json"


def _write(path: Path, known: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".new")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(known, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
