"""How a device gets its certificate, and renews it; the key is made here and never leaves.

In the folder `identity` of the state folder, where agent.toml has a kit:

    claim.pem       the kit's claim, by which a new kit is told from the one that was used
    authority.pem   the authority's certificate, by which the broker is known
    next.pem        a key that waits for its certificate
    device.pem      the certificate, and its key

With the claim the device is the user `DEVICE:join`, who may hand in a request and read its answer.
"""

import hashlib
import logging
import os
import queue
import ssl
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ondevice.config import AUTHORITY, CERTIFICATE, IDENTITY, AgentConfig
from wire import messages, storage, topics
from wire.address import BrokerAddress
from wire.errors import RefusedError, WireError
from wire.link import Arrived, Connected, Link, LinkEvent, Lost
from wire.messages import Certificate, Sign

log = logging.getLogger("edge-agent")

TICK_S = 0.5
AGAIN_S = 15.0  # a request that was not answered or was refused is sent again after this


class Identity:
    """The certificate of a device with a kit.

    Args:
        config: its settings.

    Raises:
        StorageError: the folder cannot be written; StalledError: the disk is full.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._kit, self._name, self._folder = config.kit, config.device, config.state / IDENTITY
        self._claim, self._next = self._folder / "claim.pem", self._folder / "next.pem"
        with storage.at(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _content(self._claim) != self._kit.claim.encode():
                for path in (self._folder / CERTIFICATE, self._next):  # by another kit
                    path.unlink(missing_ok=True)
                storage.write(self._claim, self._kit.claim.encode(), 0o600)
            if _content(self._folder / AUTHORITY) != self._kit.authority.encode():
                storage.write(self._folder / AUTHORITY, self._kit.authority.encode())

    @property
    def joined(self) -> bool:
        """Whether there is a certificate; it may have ended."""
        return (self._folder / CERTIFICATE).exists()

    def check(self) -> None:
        """Return if the certificate and its key can be read.

        Raises:
            RefusedError: they cannot.
        """
        path = self._folder / CERTIFICATE
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(path, password="")
        except (OSError, ValueError) as fault:
            raise RefusedError(
                f"{path}: this device's certificate is damaged ({fault}); enroll the device again, "
                "and copy its new kit to it"
            ) from fault

    def claiming(self, broker: BrokerAddress) -> BrokerAddress:
        """The broker's address with the claim as credentials."""
        return replace(broker, cert_file=self._claim)

    def request(self) -> Sign:
        """A certificate request for the key that waits, which is made on first use."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        known_by = self._folder / CERTIFICATE if self.joined else self._claim
        with storage.at(self._folder):
            try:
                key = serialization.load_pem_private_key(self._next.read_bytes(), None)
            except (FileNotFoundError, ValueError):
                key = ec.generate_private_key(ec.SECP256R1())
                pem = key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
                storage.write(self._next, pem, 0o600)
            known = serialization.load_pem_private_key(_private(known_by.read_bytes()), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - as all that we write
        assert isinstance(known, ec.EllipticCurvePrivateKey)  # noqa: S101 - as all in kits
        made = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        request = made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        return Sign(request, known.sign(request, ec.ECDSA(hashes.SHA256())))

    def take(self, pem: str) -> bool:
        """Use a certificate from now on.

        Returns False if it is not one of the fleet's authority for this device and the key that
        waits: nothing changes then.
        """
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization

        if not self._next.exists():  # answered before
            return False
        with storage.at(self._folder):
            key = self._next.read_bytes()
            try:
                made = x509.load_pem_x509_certificate(pem.encode())
                authority = x509.load_pem_x509_certificate(self._kit.authority.encode())
                made.verify_directly_issued_by(authority)
                public = serialization.load_pem_private_key(key, None).public_key()
            except (ValueError, TypeError, InvalidSignature):
                return False
            if made.public_key() != public or made.subject.rfc4514_string() != f"CN={self._name}":
                return False
            storage.write(self._folder / CERTIFICATE, pem.encode() + key, 0o600)
            self._next.unlink()
            storage.sync_folder(self._folder)
        return True


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _private(pem: bytes) -> bytes:
    """The private key in a PEM file that begins with a certificate."""
    return pem[pem.find(b"-----BEGIN PRIVATE KEY") :]


def join(config: AgentConfig, say: Callable[[str], None], pause: Callable[[], bool]) -> None:
    """Get the device's first certificate, if its kit has a claim and it has none.

    Args:
        config: the settings.
        say: is told what is waited for.
        pause: called often; returns whether to stop.

    Raises:
        RefusedError: the orchestrator gives this device no certificate, or the one that it has is
            damaged.
        LinkError: the claim cannot be used.
        StorageError: the state folder cannot be written; StalledError: the disk is full.
    """
    if not config.kit.claim:
        return
    identity = Identity(config)
    if identity.joined:
        identity.check()
        return
    say("waiting for the orchestrator to give this device its certificate")
    log.info("this device has no certificate yet: asking the orchestrator for one")
    user = topics.joining(config.device)
    events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    link = Link(
        identity.claiming(config.broker),
        f"{config.client_id}-join-{os.getpid()}",
        subscriptions=[(topics.topic(config.fleet, user, "order"), 1)],
        emit=events.put,
    )
    request = identity.request()
    payload = messages.encode(request)
    again_s = 0.0
    link.start()
    try:
        while not pause():
            if link.refused:
                raise link.refused
            try:
                event = events.get(timeout=TICK_S)
            except queue.Empty:
                if link.connected and time.monotonic() >= again_s:
                    again_s = time.monotonic() + AGAIN_S
                    link.publish(topics.topic(config.fleet, user, "sign"), payload)
                continue
            match event:
                case Connected():
                    again_s = 0.0
                case Lost(reason):
                    log.warning("%s; trying again", reason)
                case Arrived(_, answer):
                    if _answered(identity, request, answer):
                        log.info("this device has its certificate")
                        return
    finally:
        link.close()


def _answered(identity: Identity, request: Sign, payload: bytes) -> bool:
    """Whether a message has the certificate, which is then in use.

    Raises:
        RefusedError: it says that there will be none.
    """
    try:
        message, _ = messages.decode(payload, sender="the orchestrator")
    except WireError as fault:
        log.warning("message dropped: %s", fault)
        return False
    asked = hashlib.sha256(request.request).hexdigest()
    if not isinstance(message, Certificate) or message.request != asked:
        return False
    if message.reason:
        raise RefusedError(f"the orchestrator gives no certificate: {message.reason}")
    return identity.take(message.pem)
