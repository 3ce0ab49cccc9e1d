"""The identity with which a device signs: its configuration, and a key that it creates once.

    with agent.toml       KEY in its `state` folder, and its device name
    without               KEY in $XDG_STATE_HOME/stillhouse (~/.local/state/stillhouse), no name

Whoever has the state folder has the key. So the key proves only that two reports come from the same
folder.
"""

import os
from pathlib import Path

from ondevice import config
from ondevice.config import AgentConfig
from wire.errors import SettingsError, SignatureError

INSTALLED = Path("/etc/stillhouse/agent.toml")
KEY = "device.pem"


def settings(named: Path | None) -> AgentConfig | None:
    """The named configuration, or the installed one if this user may read it; else None.

    Raises:
        SettingsError: the file is wrong, or the named one cannot be read.
    """
    if named is None and not os.access(INSTALLED, os.R_OK):
        return None
    try:
        return config.load(named or INSTALLED)
    except OSError as fault:  # a folder above a certificate is closed to this user
        raise SettingsError(
            f"{named or INSTALLED}: {fault.filename} cannot be read: {fault.strerror}; "
            "run this as the agent's user: sudo -u stillhouse edge-agent ..."
        ) from fault


def key_file(chosen: AgentConfig | None) -> Path:
    """The path of this device's key, which may not exist yet; its folder is created.

    Raises:
        SignatureError: this user can neither read a key there nor create one.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    folder = chosen.state if chosen else base / "stillhouse"
    path = folder / KEY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0 and folder.stat().st_uid != 0:
            # By a link, the folder's owner could make root write anywhere.
            raise SignatureError(f"{folder} is not root's; {_remedy(chosen)}")
        place, access = (path, os.R_OK) if path.exists() else (folder, os.W_OK | os.X_OK)
    except OSError as fault:
        raise SignatureError(f"{folder}: {fault.strerror}; {_remedy(chosen)}") from fault
    if not os.access(place, access):
        raise SignatureError(f"{path}: no key can be read or made there; {_remedy(chosen)}")
    return path


def _remedy(chosen: AgentConfig | None) -> str:
    if chosen:
        return "measure as the agent's user: sudo -u stillhouse edge-agent measure"
    return "let XDG_STATE_HOME name a folder that can be written"
