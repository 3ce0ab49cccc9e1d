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

Keys are P-256, and certificates follow RFC 5280. The common name is the broker's user name.
Certificates are valid from 2020 on, because a device without a clock battery may begin there.
"""

import ipaddress
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from orchestrator.fleet import files
from wire import records, signing, storage, topics
from wire.errors import AdmissionError, RunError

DAY_S = 24 * 3600
CLAIM_DAYS = 14  # from `enroll` to the device's first start
_AUTHORITY_DAYS, _SERVER_DAYS = 30 * 365, 2 * 365
_CRL_DAYS = 10 * 365  # it is signed anew at each start
_SINCE = datetime(2020, 1, 1, tzinfo=UTC)
_LEAST_RSA_BITS = 2048
_LONGEST = 64  # characters of a common name
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
            made = x509.load_pem_x509_certificate(claim.encode())
            self.revoked[_serial(made)] = _end(made)

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
        self.certificate, self._key = self._read()
        self._ca = x509.load_pem_x509_certificate(self.certificate.encode())

    def server(self, hosts: Iterable[str] = ()) -> str:
        """A certificate for the broker, with its key: PEM.

        Args:
            hosts: names and addresses by which clients reach it, besides this machine's.
        """
        named = dict.fromkeys([
            "localhost", "127.0.0.1", "::1", socket.gethostname().lower(),
            *filter(None, hosts), *self._known().hosts,
        ])  # fmt: skip
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._sign("broker", key.public_key(), _SERVER_DAYS, names=[_alt(n) for n in named])
        return _pem(made) + _private(key)

    def client(self, user: str, days: float) -> str:
        """A certificate for a user of the broker, with its key: PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        return _pem(self._sign(user, key.public_key(), days)) + _private(key)

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
        if len(user := topics.joining(device)) > _LONGEST:
            most = _LONGEST - len(user) + len(device)
            raise RunError(f"device name {device!r}: with certificates, use up to {most} letters")
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._sign(user, key.public_key(), days)
        pem = _pem(made) + _private(key)
        with self._change() as known:
            before = known.devices.get(device, Held())
            known.revoke({}, before.claim)
            known.devices[device] = Held(claim=_pem(made), serials=before.serials)
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
        key = _requested(request)
        fingerprint, joins = _fingerprint(key), user != device
        held = self._known().devices.get(device, Held())
        if not held.claim or not (joins or held.certificate):
            raise AdmissionError(
                f"device {device!r} has no kit of fleet {self._fleet!r}; run: orchestrator "
                f"enroll {device}"
            )
        _check_proof(held.claim if joins else held.certificate, request, proof)
        if held.key == fingerprint:
            return held.certificate
        if joins and held.key:
            raise AdmissionError(
                f"the kit of {device!r} was used before, with another key; run: orchestrator "
                f"enroll {device}, and copy the new kit to it"
            )
        if not joins and not due(held, self._clock(), days):
            raise AdmissionError(f"the certificate of {device!r} is not due to be renewed")
        made = self._sign(device, key, days)
        serials = {s: until for s, until in held.serials.items() if until > self._clock()}
        with self._change() as known:
            if joins:
                known.revoke(serials)
                serials = {}
            known.devices[device] = replace(
                held, certificate=_pem(made), key=fingerprint, until=_end(made), renew=False,
                serials=serials | {_serial(made): _end(made)},
            )  # fmt: skip
        return _pem(made)

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
        now = datetime.fromtimestamp(self._clock(), UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._ca.subject)
            .last_update(now - timedelta(days=1))
            .next_update(now + timedelta(days=_CRL_DAYS))
        )
        for serial, until in self._known().revoked.items():
            if until > self._clock():
                entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16))
                builder = builder.add_revoked_certificate(entry.revocation_date(now).build())
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _sign(
        self, user: str, key: Any, days: float, *, names: list[x509.GeneralName] | None = None
    ) -> x509.Certificate:
        """A certificate: of a server if it has names, else of a client."""
        usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(_named(user), self._ca.subject, key, self._clock() + days * DAY_S)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(by, critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _named(f"Stillhouse fleet {self._fleet}"[:64])
        made = (
            _builder(name, name, key.public_key(), self._clock() + _AUTHORITY_DAYS * DAY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        signing.own_key(self._folder / "signer.key")
        storage.write(self._folder / "authority.json", b"{}", 0o600)
        storage.write(self._folder / "ca.key", _private(key).encode(), 0o600)
        storage.write(self._folder / "ca.pem", _pem(made).encode(), 0o600)

    def _read(self) -> tuple[str, ec.EllipticCurvePrivateKey]:
        path = self._folder / "ca.key"
        for name in ("authority.json", "signer.key"):
            if not (self._folder / name).exists():
                raise RunError(f"{self._folder / name} is gone; {_REMEDY}")
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            pem = (self._folder / "ca.pem").read_text("ascii")
            same = x509.load_pem_x509_certificate(pem.encode()).public_key() == key.public_key()
        except (OSError, ValueError, TypeError) as fault:
            raise RunError(f"{self._folder}: ca.key and ca.pem: {fault}; {_REMEDY}") from fault
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not same:
            raise RunError(f"{path} is not the key of ca.pem; {_REMEDY}")
        return pem, key

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


def _requested(request: bytes) -> Any:
    """The public key of a certificate request.

    Raises:
        AdmissionError: it is damaged, not signed by its key, or the key is too weak.
    """
    try:
        read = x509.load_der_x509_csr(request)
        signed, key = read.is_signature_valid, read.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as fault:
        raise AdmissionError(f"a certificate request that cannot be read: {fault}") from fault
    strong = (
        isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1")
    ) or (isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA_BITS)
    if not signed or not (strong or isinstance(key, ed25519.Ed25519PublicKey)):
        raise AdmissionError(
            "a certificate request: expected one that its key signed, with a key on P-256 or "
            f"P-384, Ed25519, or RSA of {_LEAST_RSA_BITS} bits"
        )
    return key


def _check_proof(certificate: str, request: bytes, proof: bytes) -> None:
    """Raise AdmissionError unless the key of a certificate (PEM) signed the request."""
    key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    try:
        match key:
            case ec.EllipticCurvePublicKey():
                key.verify(proof, request, ec.ECDSA(hashes.SHA256()))
            case rsa.RSAPublicKey():
                key.verify(proof, request, padding.PKCS1v15(), hashes.SHA256())
            case ed25519.Ed25519PublicKey():
                key.verify(proof, request)
    except InvalidSignature:
        raise AdmissionError(
            "a certificate request that the key of the device's kit or newest certificate did not "
            "sign"
        ) from None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: Any, until_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_SINCE)
        .not_valid_after(datetime.fromtimestamp(int(until_s), UTC))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _alt(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return x509.DNSName(host)


def _fingerprint(key: Any) -> str:
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


def _serial(made: x509.Certificate) -> str:
    return f"{made.serial_number:x}"


def _end(made: x509.Certificate) -> int:
    return int(made.not_valid_after_utc.timestamp())


def _pem(made: x509.Certificate) -> str:
    return made.public_bytes(serialization.Encoding.PEM).decode()


def _private(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
