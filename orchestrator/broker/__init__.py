"""Brokers that the orchestrator runs itself, in child processes that end with it.

    orchestrator --stdin pipe--> python -m orchestrator.broker --+--> mosquitto
                                                                 +--> amqtt, in this process

The middle process ends its broker when its stdin closes or its parent is gone, so even `kill -9` of
the orchestrator leaves nothing behind. If Mosquitto dies after it had run a while, it is restarted.

`mosquitto` is for fleets: retained messages, sessions and their queues are saved in `folder`, every
`AUTOSAVE_S` seconds and at a clean end. `kill -9` or a power cut loses what the broker received
since the last save, although it had acknowledged it. It speaks TLS if it is given certificates.

`embedded` is amqtt, pure Python, MQTT 3.1.1 only: for demonstrations on one computer. It keeps all
state in memory, listens on loopback only, and has the limits listed in `embedded.py`.
"""

import contextlib
import errno
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, get_args

from orchestrator.broker.access import ORCHESTRATOR, access_list, hashed, matches, passwords
from orchestrator.broker.mosquitto import SBIN, configuration, find
from wire import address, storage, topics
from wire.errors import BrokerError

__all__ = ["Broker", "Certificates", "Kind", "certify", "check", "find", "let_in", "start"]

Kind = Literal["mosquitto", "embedded"]
_STOP_S = 10.0
_START_S = 60.0  # how long a broker may take to answer
# CONNECT, MQTT 3.1.1, clean session, keep-alive 5 s, no client id, no user: a broker answers with a
# CONNACK, whether it accepts or not.
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x05\x00\x00"
_CONNACK = b"\x20"
_PID = "broker.pid"


class Certificates(NamedTuple):
    """What a broker needs for mutual TLS, as PEM; each lies in its folder as NAME.pem.

    `orchestrator` is a certificate with its key for the user of that name, `server` one for the
    broker, `crl` the list of revoked certificates.
    """

    ca: bytes
    server: bytes
    orchestrator: bytes
    crl: bytes


@dataclass
class Broker:
    """A running broker, made by `start`. Leaving its context stops it."""

    kind: Kind
    url: str
    folder: Path
    _child: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """The process id of the broker; a restarted Mosquitto has a new one."""
        return int((self.folder / _PID).read_text("ascii"))

    @property
    def running(self) -> bool:
        """Whether the middle process, which runs the broker, is alive."""
        return self._child.poll() is None

    def stop(self) -> None:
        """End the broker and wait for it; Mosquitto saves its state. May be called again."""
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


def start(
    kind: Kind,
    *,
    folder: Path,
    fleet: str,
    host: str = "127.0.0.1",
    port: int = 1883,
    users: Mapping[str, str] | None = None,
    certificates: Certificates | None = None,
) -> Broker:
    """Start a broker and return once it answers.

    Args:
        kind: `mosquitto`, or `embedded` (amqtt; loopback only).
        folder: for its configuration, log and state; one broker a folder.
        fleet: the access list allows this fleet's topics.
        host: the address to listen on.
        port: 0 picks a free port.
        users: passwords by user name: device names and `orchestrator`. None allows everything to
            everybody.
        certificates: makes a Mosquitto speak mutual TLS; `users` then counts for nothing.

    Raises:
        BrokerError: it does not run; the message says why and what to do.
    """
    check(kind, host, fleet, users)
    binary = find()
    wanted, port = port, _claim(host, port)
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if certificates:
        users = None
        for name, pem in zip(Certificates._fields, certificates, strict=True):
            storage.write(folder / f"{name}.pem", pem, 0o600)
    if users is not None:
        _write(folder / "passwd", {user: hashed(users[user]) for user in users})
    command = [sys.executable, "-m", "orchestrator.broker", str(folder)]
    if kind == "mosquitto":
        config = configuration(
            folder, host, port, passwords=users is not None, tls=certificates is not None
        )
        for name, text in (("acl", access_list(fleet)), ("mosquitto.conf", config)):
            storage.write(folder / name, text.encode(), 0o600)
        command += ["mosquitto", str(binary)]
    else:
        passwd = "" if users is None else str(folder / "passwd")
        command += ["embedded", host, str(port), fleet, passwd]
    (folder / _PID).unlink(missing_ok=True)  # left by an earlier broker
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
            umask=0o077,
            start_new_session=True,  # Ctrl-C in the terminal is for the orchestrator alone
        )
    reach = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    shown = f"[{reach}]" if ":" in reach else reach
    scheme, context = ("mqtts", _context(folder)) if certificates else ("mqtt", None)
    broker = Broker(kind, f"{scheme}://{shown}:{port}", folder, child)
    deadline = time.monotonic() + _START_S
    while not (_answers(reach, port, context) and (folder / _PID).exists()):
        late = time.monotonic() > deadline
        if late or not broker.running:
            broker.stop()
            if not (wanted or late or _free(host, port)):  # another program took the port first
                return start(
                    kind, folder=folder, fleet=fleet, host=host, port=0, users=users,
                    certificates=certificates,
                )  # fmt: skip
            what = f"did not answer on {host}:{port} in {_START_S:g} s" if late else "died at start"
            tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-8:])
            raise BrokerError(f"{kind} broker {what}; the end of {log}:\n{tail}")
        time.sleep(0.02)
    return broker


def check(kind: str, host: str, fleet: str, users: Mapping[str, str] | None = None) -> None:
    """Check, as far as possible beforehand, that `start` can start a broker with these arguments.

    Raises:
        BrokerError: it cannot; the message says why and what to do.
    """
    if kind not in get_args(Kind):
        raise BrokerError(f"broker kind {kind!r}: expected 'mosquitto' or 'embedded'")
    try:
        topics.check_name(fleet, "fleet")
        for user in users or ():
            if user != ORCHESTRATOR:
                topics.check_name(user, "broker user")
    except ValueError as error:
        raise BrokerError(str(error)) from None
    if kind == "embedded" and not address.is_local(host):
        raise BrokerError(
            f"the embedded broker is for demonstrations on one computer and listens on "
            f"loopback only, not on {host!r}: use kind 'mosquitto', or host '127.0.0.1'"
        )
    if kind == "mosquitto" and find() is None:
        raise BrokerError(
            f"mosquitto: no such program on PATH or in {', '.join(SBIN)}; install it "
            "(sudo apt install mosquitto), or use kind 'embedded' for a demonstration"
        )


def let_in(folder: Path, users: Mapping[str, str]) -> None:
    """Replace the users of a folder's broker; a running one follows within half a second.

    It ends the connections of users that are no longer there; other clients stay connected.
    Without a password file nothing is done: the broker asks for no passwords.

    Args:
        folder: as given to `start`.
        users: all users, as given to `start`.
    """
    path = folder / "passwd"
    if not path.exists():
        return
    known = passwords(path)
    stored = {
        user: known[user] if user in known and matches(password, known[user]) else hashed(password)
        for user, password in users.items()
    }
    with storage.at(path):
        _write(path, stored)


def certify(folder: Path, **certificates: bytes) -> None:
    """Replace a broker's certificates (`Certificates`); a running one follows within a second.

    After a new `crl` it begins anew, so that revoked connections end; sessions stay. A broker
    without TLS has no certificates, and nothing is done.
    """
    for name, pem in certificates.items():
        path = folder / f"{name}.pem"
        if path.exists():
            with storage.at(path):
                storage.write(path, pem, 0o600)


def _claim(host: str, port: int) -> int:
    """`port`, or a free port if it is 0, after a trial bind.

    Raises:
        BrokerError: the port is in use, or the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BrokerError(
                    f"port {port} on {host} is in use: is another broker running? Stop it "
                    "(sudo systemctl stop mosquitto), give its URL instead, or choose another port"
                ) from None
            raise BrokerError(f"cannot listen on {host}:{port}: {error}") from error
        return int(trial.getsockname()[1])


def _free(host: str, port: int) -> bool:
    try:
        _claim(host, port)
    except BrokerError:
        return False
    return True


def _write(path: Path, stored: Mapping[str, str]) -> None:
    """Write a password file that only this user can read."""
    lines = (f"{user}:{password}\n" for user, password in sorted(stored.items()))
    storage.write(path, "".join(lines).encode(), 0o600)


def _python_path() -> str:
    """A PYTHONPATH with which the child finds this package, even in a checkout."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def _context(folder: Path) -> ssl.SSLContext:
    """TLS as the orchestrator."""
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "orchestrator.pem")
    return context


def _answers(host: str, port: int, context: ssl.SSLContext | None) -> bool:
    """Whether a broker answers a CONNECT; that a port is open proves nothing."""
    try:
        with contextlib.ExitStack() as stack:
            open_ = stack.enter_context
            connection = open_(socket.create_connection((host, port), timeout=1.0))
            if context:
                connection = open_(context.wrap_socket(connection, server_hostname=host))
            connection.sendall(_CONNECT)
            return connection.recv(1) == _CONNACK
    except OSError:
        return False
