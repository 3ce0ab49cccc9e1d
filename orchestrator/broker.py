"""Brokers that the orchestrator runs itself, each in child processes that cannot outlive it.

    orchestrator --stdin pipe--> python -m orchestrator.broker --+--> mosquitto
                                                                 +--> amqtt, in this process

The middle process ends its broker when its stdin closes or its parent is gone, so even `kill -9` of
the orchestrator leaves nothing behind. It restarts a Mosquitto that dies after it had run.

`mosquitto` is the one for fleets: retained messages, sessions and their queues outlive it in
`folder`. They are written every `autosave_s` seconds and at a clean end: `kill -9` or a power cut
loses what the broker took since the last write, although it had acknowledged it.

`embedded` is amqtt, pure Python, MQTT 3.1.1 only: for demonstrations on one computer, loopback
only. It keeps everything in memory. See `orchestrator/embedded.py` for its limits.
"""

import argparse
import asyncio
import contextlib
import ctypes
import errno
import hashlib
import ipaddress
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from wire import topics
from wire.errors import BrokerError

Kind = Literal["mosquitto", "embedded"]
ORCHESTRATOR = "orchestrator"
MAX_PACKET_BYTES = 1 << 20
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")  # often not on a user's PATH
_HASH_ROUNDS = 10_000
_STOP_S = 10.0
_SETTLED_S = 1.0  # a Mosquitto that lived this long is restarted when it dies


@dataclass(frozen=True)
class Tls:
    """PEM files of a TLS listener (Mosquitto only).

    With `require_certificate`, the common name of the client's certificate is its user name:
    a device's name, or `orchestrator`.
    """

    cafile: Path
    certfile: Path
    keyfile: Path
    require_certificate: bool = True


class Broker:
    """A running broker; `start` makes it. Leaving its context stops it."""

    def __init__(self, kind: Kind, url: str, folder: Path, child: "subprocess.Popen[bytes]") -> None:
        self.kind: Kind = kind
        self.url = url
        self.folder = folder
        self._child = child

    @property
    def pid(self) -> int:
        """The process that serves the clients; a Mosquitto restarted after a crash has a new one."""
        return int((self.folder / "broker.pid").read_text("ascii"))

    @property
    def running(self) -> bool:
        """Whether the broker, or at least the process that restarts it, is alive."""
        return self._child.poll() is None

    def stop(self) -> None:
        """End the broker and wait for it: Mosquitto saves its state. May be called again."""
        if self._child.stdin is not None:
            self._child.stdin.close()
        try:
            self._child.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def find_mosquitto() -> Path | None:
    """The Mosquitto binary, or None; Debian's stands in /usr/sbin, off a plain user's PATH."""
    found = shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), *_SBIN]))
    return Path(found) if found else None


def start(
    kind: Kind,
    *,
    folder: Path,
    fleet: str,
    host: str = "127.0.0.1",
    port: int = 1883,
    users: Mapping[str, str] | None = None,
    tls: Tls | None = None,
    autosave_s: int = 5,
    start_s: float = 15.0,
) -> Broker:
    """Start a broker and return once it answers.

    Args:
        kind: `mosquitto`, or `embedded` (amqtt; loopback only, no TLS).
        folder: for its configuration, log and state; made private to this user.
        fleet: whose topics the access list opens.
        host: the address to listen on.
        port: 0 picks a free one.
        users: passwords by user name: device names and `orchestrator`. None lets anybody in,
            unless `tls` asks for certificates.
        tls: serve mqtts with these files.
        autosave_s: how often Mosquitto writes its state; what a crash may lose.
        start_s: how long the broker may take to answer.

    Raises:
        BrokerError: it does not run, and what to do.
    """
    _check(kind, host, fleet, users, tls)
    binary = find_mosquitto()
    if kind == "mosquitto" and binary is None:
        raise BrokerError(
            "mosquitto: the binary was found neither on PATH nor in "
            f"{', '.join(_SBIN)}; install it (sudo apt install mosquitto) or use kind 'embedded'"
        )
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = _claim(host, port)
    guarded = users is not None or (tls is not None and tls.require_certificate)
    if users is not None:
        _write(folder / "passwd", "".join(f"{u}:{hashed(p)}\n" for u, p in sorted(users.items())))
    command = [sys.executable, "-m", "orchestrator.broker", str(folder)]
    if kind == "mosquitto":
        if guarded:
            _write(folder / "acl", access_list(fleet))
        config = mosquitto_conf(folder, host, port, users is not None, tls, autosave_s)
        _write(folder / "mosquitto.conf", config)
        command += ["mosquitto", str(binary)]
    else:
        command += ["embedded", host, str(port), fleet, *(["--passwords"] if guarded else [])]
    log = folder / "broker.log"
    if log.exists():
        log.replace(folder / "broker.log.1")
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHONPATH": _python_path()},
            start_new_session=True,  # Ctrl-C in a terminal is for the orchestrator alone
        )
    reach = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host  # noqa: S104  # compared
    name = f"[{reach}]" if ":" in reach else reach
    broker = Broker(kind, f"{'mqtts' if tls else 'mqtt'}://{name}:{port}", folder, child)
    deadline = time.monotonic() + start_s
    while not _answers(reach, port, encrypted=tls is not None):
        late = time.monotonic() > deadline
        if late or child.poll() is not None:
            broker.stop()
            what = f"did not answer on {host}:{port} in {start_s:g} s" if late else "died at start"
            tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-8:])
            raise BrokerError(f"{kind} {what}; the end of {log}:\n{tail}")
        time.sleep(0.02)
    return broker
