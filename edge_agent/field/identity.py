"""Which device this is when it signs: its configuration, and the key that it made once.

    agent.toml is at hand    KEY in its `state` folder, and its device name
    otherwise                KEY in $XDG_STATE_HOME/stillhouse (~/.local/state/stillhouse), no name

Whoever has the state folder has the key: it proves that a report comes from where the first one
came from, no more.
"""

import os
from pathlib import Path

from ondevice import config
from ondevice.config import AgentConfig
from wire.errors import SettingsError, SignatureError

INSTALLED = Path("/etc/stillhouse/agent.toml")
KEY = "device.pem"


def settings(named: Path | None) -> AgentConfig | None:
    """The configuration that was named, or the installed one where this user may read it.

    Raises:
        SettingsError: the file is wrong, or the named one cannot be read.
    """
    if named is None and not os.access(INSTALLED, os.R_OK):
        return None
    try:
        return config.load(named or INSTALLED)
    except OSError as fault:  # a folder on the way to a certificate
        raise SettingsError(
            f"{named or INSTALLED}: {fault.filename} cannot be read: {fault.strerror}; "
            "run this as the agent's user: sudo -u stillhouse edge-agent ..."
        ) from fault


def key_file(chosen: AgentConfig | None) -> Path:
    """Where this device's key is, or will be; its folder is there then.

    Raises:
        SignatureError: this user can neither read a key there nor make one.
    """
    base = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    folder = chosen.state if chosen else base / "stillhouse"
    path = folder / KEY
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0 and folder.stat().st_uid != 0:
            # Its owner could have root write wherever a link of theirs leads.
            raise SignatureError(f"{folder} is not root's; {_remedy(chosen)}")
        place, wanted = (path, os.R_OK) if path.exists() else (folder, os.W_OK | os.X_OK)
    except OSError as fault:
        raise SignatureError(f"{folder}: {fault.strerror}; {_remedy(chosen)}") from fault
    if not os.access(place, wanted):
        raise SignatureError(f"{path}: no key can be read or made there; {_remedy(chosen)}")
    return path


def _remedy(chosen: AgentConfig | None) -> str:
    if chosen:
        return "measure as the agent's user: sudo -u stillhouse edge-agent measure"
    return "let XDG_STATE_HOME name a folder that can be written"
