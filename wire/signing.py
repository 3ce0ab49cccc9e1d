"""Ed25519 signatures (RFC 8032), for what must not rest on the broker: releases and measurements.

A private key is a PKCS #8 PEM file that only its owner can read. A public key is written as
`ed25519:` and the base64 of its 32 bytes, a signature as the base64 of its 64. The signed bytes
begin with a context (a name and a zero byte), so that the signature of a release is never valid for
a measurement. `cryptography` is imported at first use, because an idle agent does not need it.
"""

import base64
import binascii
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from wire import storage
from wire.errors import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    PrivateKey = Ed25519PrivateKey

PREFIX = "ed25519:"


def own_key(path: Path) -> "PrivateKey":
    """The private key in a file; if there is no file, it is created with a new key.

    Raises:
        SignatureError: the file does not hold such a key, or cannot be read or created.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        if not path.exists():
            pem = Ed25519PrivateKey.generate().private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            # A name of its own: two programs may make the key at once, and the last one counts.
            partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
            storage.write(partial, pem, 0o600)
            partial.replace(path)
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as fault:
        raise SignatureError(f"{path}: {fault.strerror}; no key can be kept there") from fault
    except (ValueError, TypeError) as fault:
        raise SignatureError(f"{path}: expected an unencrypted PEM private key: {fault}") from fault
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path}: expected an Ed25519 key, got {type(key).__name__}")
    return key


def public(key: "PrivateKey") -> str:
    """The public key that belongs to a private one, as text."""
    return PREFIX + base64.b64encode(key.public_key().public_bytes_raw()).decode()


def sign(key: "PrivateKey", context: str, message: bytes) -> str:
    """The signature of a message, as text."""
    return base64.b64encode(key.sign(_in_context(context, message))).decode()


def verify(by: str, context: str, message: bytes, signature: str) -> None:
    """Return if the owner of a public key signed this message in this context.

    Raises:
        SignatureError: the key or signature is malformed, or the owner did not sign this.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    check_public(by)
    try:
        signature_bytes = base64.b64decode(signature, validate=True)
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(by.removeprefix(PREFIX)))
        key.verify(signature_bytes, _in_context(context, message))
    except (ValueError, InvalidSignature) as fault:
        raise SignatureError(f"{context}: this is not signed by {by}") from fault


def check_public(text: str) -> None:
    """Return if a text is a public key.

    Raises:
        SignatureError: it is not; the message shows what one looks like.
    """
    try:
        size = len(base64.b64decode(text.removeprefix(PREFIX), validate=True))
    except (binascii.Error, ValueError):
        size = 0
    if not text.startswith(PREFIX) or size != 32:
        raise SignatureError(f"expected a public key, {PREFIX} and 44 characters; got {text!r:.80}")


def _in_context(context: str, message: bytes) -> bytes:
    return context.encode() + b"\0" + message
