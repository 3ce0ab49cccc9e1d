"""A fleet's certificate authority: who holds which certificate, in a folder of its own.

runs/authority-FLEET/
    ca.pem, ca.key      the authority's certificate and its private key
    signer.key          signs orders and receipts (`wire.sealing`)
    sealed              when the last order was signed, at most
    authority.json      hosts of the broker; certificates of each device; serials that are revoked

A device makes its key itself, and the key never leaves it. Its kit holds a claim: a certificate and
key for the user `DEVICE:join`, of whom nothing counts but a certificate request (PKCS #10).
The first key that comes with a claim gets the certificate; later ones are refused. So a claim that
is read from a card after the device has joined is worth nothing.

A certificate's common name is the broker's user name. `issuing` makes the certificates.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives import serialization

from orchestrator.fleet import files, issuing
from orchestrator.fleet.issuing import Issuer, Key
from wire import records, signing, storage, topics
from wire.errors import AdmissionError, RunError

DAY_S = 24 * 3600
CLAIM_DAYS = 14  # from `enroll` to the device's first start
_AUTHORITY_DAYS, _SERVER_DAYS = 30 * 365, 2 * 365
_REMEDY = "restore it from a copy, or remove the folder and enroll every device anew"


@dataclass(frozen=True)
class Held:
    """What one device holds; times are seconds since 1970.

    Attributes:
        claim: the certificate of the claim in its newest kit, PEM; "" after it was revoked.
        certificate: its newest one, PEM; "" until it joins by the newest kit.
        key: SHA-256 of that one's public key.
        until: when that one ends.
        renew: whether the device is to get a new one at once.
        serials: ends of all its certificates, by serial.
    """

    claim: str = ""
    certificate: str = ""
    key: str = ""
    until: int = 0
    renew: bool = False
    serials: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Known:
    """The content of authority.json; `revoked` has the ends of revoked certificates by serial."""

    hosts: tuple[str, ...] = ()
    devices: Mapping[str, Held] = field(default_factory=dict)
    revoked: Mapping[str, int] = field(default_factory=dict)


class _Changes:
    """A copy of `_Known` that can be changed."""

    def __init__(self, known: _Known) -> None:
        self.hosts, self.devices = list(known.hosts), dict(known.devices)
        self.revoked = dict(known.revoked)

    def revoke(self, serials: Mapping[str, int], claim: str = "") -> None:
        self.revoked |= serials
        if claim:
            made = issuing.read(claim)
            self.revoked[issuing.serial(made)] = issuing.end(made)

    def known(self, now_s: float) -> _Known:
        """All of it, without revoked certificates that have ended."""
        revoked = {serial: until for serial, until in self.revoked.items() if until > now_s}
        return _Known(tuple(self.hosts), self.devices, revoked)


class Authority:
    """The authority of a fleet; it is made on first use.

    Args:
        runs: folder of all runs.
        fleet: its name.
        clock: seconds since 1970.

    Attributes:
        certificate: its own, PEM.

    Raises:
        RunError: its folder is damaged.
    """

    def __init__(self, runs: Path, fleet: str, *, clock: Callable[[], float] = time.time) -> None:
        self._runs, self._fleet, self._clock = runs, fleet, clock
        self._folder = folder(runs, fleet)
        with files.alone(runs), storage.at(self._folder):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if not (self._folder / "ca.pem").exists():
                self._make()
        self._issuer = self._read()
        self.certificate = issuing.pem(self._issuer.certificate)

    def server(self) -> str:
        """A certificate for the broker, with its key: PEM."""
        hosts = dict.fromkeys([
            "localhost", "127.0.0.1", "::1", socket.gethostname().lower(), *self._known().hosts,
        ])  # fmt: skip
        key = issuing.new_key()
        until_s = self._clock() + _SERVER_DAYS * DAY_S
        made = issuing.certificate(
            "broker", key.public_key(), until_s, by=self._issuer, hosts=hosts
        )
        return issuing.pem(made) + issuing.private(key)

    def client(self, user: str, days: float) -> str:
        """A certificate for a user of the broker, with its key: PEM."""
        key = issuing.new_key()
        until_s = self._clock() + days * DAY_S
        made = issuing.certificate(user, key.public_key(), until_s, by=self._issuer)
        return issuing.pem(made) + issuing.private(key)

    def signer(self) -> "signing.PrivateKey":
        """The key that signs orders and receipts.

        Raises:
            SignatureError: its file is damaged.
        """
        return signing.own_key(self._folder / "signer.key")

    @property
    def sealed(self) -> Path:
        """The file by which no order is signed with an earlier time than the last one."""
        return self._folder / "sealed"

    def add_host(self, host: str) -> bool:
        """Note a name or address of the broker; returns whether it is new."""
        with self._change() as known:
            new = host not in known.hosts
            known.hosts += [host] * new
        return new

    def claim(self, device: str, days: float = CLAIM_DAYS) -> str:
        """A claim for a device's kit, PEM; an earlier claim ends, its certificates do not.

        Raises:
            RunError: the name is too long for a certificate (RFC 5280, ub-common-name).
        """
        if len(user := topics.joining(device)) > issuing.LONGEST:
            most = issuing.LONGEST - len(user) + len(device)
            raise RunError(f"device name {device!r}: with certificates, use up to {most} letters")
        pem = self.client(user, days)
        with self._change() as known:
            before = known.devices.get(device, Held())
            known.revoke({}, before.claim)
            claim = issuing.pem(issuing.read(pem))  # without the key
            known.devices[device] = Held(claim=claim, serials=before.serials)
        return pem

    def sign(self, user: str, request: bytes, proof: bytes, days: float) -> str:
        """The certificate (PEM) for a request of a broker's user.

        The same key gets the same certificate. When a device joins, those that it had by earlier
        kits are revoked.

        Args:
            user: a device, or who is about to join as one.
            request: PKCS #10, DER.
            proof: the request, signed with the key of the claim or of the newest certificate. So a
                connection that outlives its certificate is worth nothing.
            days: how long the certificate is to hold.

        Raises:
            AdmissionError: the request is damaged, or this user may have no certificate.
            RunError: the authority's folder is damaged.
        """
        device = topics.joined(user)
        key = issuing.requested_key(request)
        fingerprint, joins = issuing.fingerprint(key), user != device
        held = self._known().devices.get(device, Held())
        if not held.claim:
            raise AdmissionError(
                f"device {device!r} has no kit of fleet {self._fleet!r}; run: orchestrator "
                f"enroll {device}"
            )
        if not joins and not held.certificate:
            raise AdmissionError(f"device {device!r} has a new kit: copy it to the device")
        issuing.check_proof(held.claim if joins else held.certificate, request, proof)
        if held.key == fingerprint:
            return held.certificate
        if joins and held.key:
            raise AdmissionError(
                f"the kit of {device!r} was used before, with another key; run: orchestrator "
                f"enroll {device}, and copy the new kit to it"
            )
        if not joins and not due(held, self._clock(), days):
            raise AdmissionError(f"the certificate of {device!r} is not due to be renewed")
        until_s = self._clock() + days * DAY_S
        made = issuing.certificate(device, key, until_s, by=self._issuer)
        serials = {s: until for s, until in held.serials.items() if until > self._clock()}
        with self._change() as known:
            if known.devices.get(device) != held:  # it was revoked or enrolled just now
                raise AdmissionError(f"the kit of {device!r} has changed; ask again")
            if joins:
                known.revoke(serials)
                serials = {}
            known.devices[device] = replace(
                held, certificate=issuing.pem(made), key=fingerprint, until=issuing.end(made),
                renew=False, serials=serials | {issuing.serial(made): issuing.end(made)},
            )  # fmt: skip
        return issuing.pem(made)

    def revoke(self, device: str) -> None:
        """End all certificates of a device, and its claim."""
        with self._change() as known:
            held = known.devices.pop(device, Held())
            known.revoke(held.serials, held.claim)

    def renew(self, device: str) -> None:
        """Let a device renew its certificate at its next contact.

        Raises:
            RunError: it has none.
        """
        with self._change() as known:
            held = known.devices.get(device, Held())
            if not held.certificate:
                raise RunError(f"device {device!r} has no certificate yet")
            known.devices[device] = replace(held, renew=True)

    def held(self) -> Mapping[str, Held]:
        """What each device holds."""
        return self._known().devices

    def revoked(self) -> bytes:
        """The revocation list, PEM."""
        now = self._clock()
        serials = (each for each, until in self._known().revoked.items() if until > now)
        return issuing.revocations(serials, now, by=self._issuer)

    def _make(self) -> None:
        until_s = self._clock() + _AUTHORITY_DAYS * DAY_S
        key, made = issuing.authority(f"Stillhouse fleet {self._fleet}", until_s)
        signing.own_key(self._folder / "signer.key")
        storage.write(self._folder / "authority.json", b"{}", 0o600)
        storage.write(self._folder / "ca.key", issuing.private(key).encode(), 0o600)
        storage.write(self._folder / "ca.pem", issuing.pem(made).encode(), 0o600)

    def _read(self) -> Issuer:
        path = self._folder / "ca.key"
        for name in ("authority.json", "signer.key"):
            if not (self._folder / name).exists():
                raise RunError(f"{self._folder / name} is gone; {_REMEDY}")
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            made = issuing.read((self._folder / "ca.pem").read_text("ascii"))
        except (OSError, ValueError, TypeError) as fault:
            raise RunError(f"{self._folder}: ca.key and ca.pem: {fault}; {_REMEDY}") from fault
        if not isinstance(key, Key) or key.public_key() != made.public_key():
            raise RunError(f"{path} is not the key of ca.pem; {_REMEDY}")
        return Issuer(key, made)

    def _known(self) -> _Known:
        table = files.read_table(self._folder / "authority.json", _REMEDY)
        return records.build(_Known, table, where=str(self._folder), error=RunError)

    @contextmanager
    def _change(self) -> Iterator[_Changes]:
        """Changes what is known, unless an error ends the block; one process at a time."""
        with files.alone(self._runs), storage.at(self._folder):
            changes = _Changes(self._known())
            yield changes
            text = json.dumps(records.plain(changes.known(self._clock())), indent=1)
            storage.write(self._folder / "authority.json", text.encode(), 0o600)


def folder(runs: Path, fleet: str) -> Path:
    """The folder of a fleet's authority."""
    return runs / f"authority-{fleet}"


def due(held: Held, now_s: float, days: float) -> bool:
    """Whether a device should renew: in the last third of its certificate's time, or on request."""
    return bool(held.certificate) and (held.renew or held.until - now_s < days * DAY_S / 3)
