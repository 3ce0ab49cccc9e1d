"""Certificates, requests and revocation lists (RFC 5280) of a fleet's authority.

Keys are P-256. Certificates are valid from 2020 on, because a device without a clock battery may
begin there.
"""

import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wire.errors import AdmissionError

Key = ec.EllipticCurvePrivateKey
LONGEST = 64  # characters of a common name
_SINCE = datetime(2020, 1, 1, tzinfo=UTC)
_LIST_DAYS = 10 * 365  # of a revocation list, which is signed anew at each start
_LEAST_RSA_BITS = 2048


class Issuer(NamedTuple):
    """An authority's key and certificate."""

    key: Key
    certificate: x509.Certificate


def new_key() -> Key:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def authority(name: str, until_s: float) -> tuple[Key, x509.Certificate]:
    """A new key, and the certificate of an authority that it signs itself."""
    key = new_key()
    named = _named(name[:LONGEST])
    made = (
        _builder(named, named, key.public_key(), until_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, made


def certificate(
    user: str,
    key: Any,
    until_s: float,
    *,
    by: Issuer,
    hosts: Iterable[str] = (),
) -> x509.Certificate:
    """A certificate: of a server if it has hosts, else of a client.

    Args:
        user: the common name.
        key: the public key.
        until_s: its end, in seconds since 1970.
        by: who issues it.
        hosts: names and addresses of the server.
    """
    names = [_alt(host) for host in hosts]
    usage = ExtendedKeyUsageOID.SERVER_AUTH if names else ExtendedKeyUsageOID.CLIENT_AUTH
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key())
    builder = (
        _builder(_named(user), by.certificate.subject, key, until_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(issued_by, critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(by.key, hashes.SHA256())


def revocations(serials: Iterable[str], now_s: float, *, by: Issuer) -> bytes:
    """The list of revoked certificates, PEM, which holds from a day before `now_s` on."""
    now = datetime.fromtimestamp(now_s, UTC)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(by.certificate.subject)
        .last_update(now - timedelta(days=1))
        .next_update(now + timedelta(days=_LIST_DAYS))
    )
    for each in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(int(each, 16))
        builder = builder.add_revoked_certificate(entry.revocation_date(now).build())
    return builder.sign(by.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def requested_key(request: bytes) -> Any:
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


def check_proof(known_by: str, request: bytes, proof: bytes) -> None:
    """Raise AdmissionError unless the key of the certificate `known_by` signed the request."""
    key = read(known_by).public_key()
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


def fingerprint(key: Any) -> str:
    """The SHA-256 of a public key, in hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


def serial(made: x509.Certificate) -> str:
    """A certificate's serial number, in hex."""
    return f"{made.serial_number:x}"


def end(made: x509.Certificate) -> int:
    """When a certificate ends, in seconds since 1970."""
    return int(made.not_valid_after_utc.timestamp())


def read(text: str) -> x509.Certificate:
    """The first certificate in a PEM text.

    Raises:
        ValueError: there is none.
    """
    return x509.load_pem_x509_certificate(text.encode())


def pem(made: x509.Certificate) -> str:
    """A certificate as PEM."""
    return made.public_bytes(serialization.Encoding.PEM).decode()


def private(key: Key) -> str:
    """A private key as PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
