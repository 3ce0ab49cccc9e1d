"""TLS to a broker: certificates from files, and what its errors mean to a person."""

import socket
import ssl
import time

from wire.address import BrokerAddress
from wire.errors import LinkError

_ALERTS = {  # TLS alerts (RFC 8446, section 6.2), as OpenSSL names them
    "certificate revoked": "it is revoked; enroll the device again, and copy its new kit to it",
    "certificate expired": "it has ended; enroll the device again, and copy its new kit to it",
    "unknown ca": "it is of another authority; is this the broker of this device's fleet?",
    "certificate required": "there is none, and the broker asks for one",
    "bad certificate": "it is not one for a client",
}


def context(address: BrokerAddress) -> ssl.SSLContext:
    """TLS 1.2 or later, with the broker's certificate checked.

    Raises:
        LinkError: a certificate or key cannot be used.
    """
    try:
        made = ssl.create_default_context(cafile=address.ca_file)
    except (OSError, ValueError) as fault:
        raise _unusable(address, fault) from fault
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    # Python 3.13 sets it, and many an authority made by hand does not fit.
    made.verify_flags &= ~ssl.VERIFY_X509_STRICT
    load(made, address)
    return made


def load(context: ssl.SSLContext, address: BrokerAddress) -> None:
    """Take our certificate and its key from their files.

    Raises:
        LinkError: they cannot be used.
    """
    if address.cert_file:
        try:
            # Without a password here, OpenSSL asks for one at the terminal.
            context.load_cert_chain(address.cert_file, address.key_file, password="")
        except (OSError, ValueError) as fault:
            raise _unusable(address, fault) from fault


def _unusable(address: BrokerAddress, fault: Exception) -> LinkError:
    return LinkError(
        f"no connection to {address.url} with these files: {fault}; ca_file, cert_file and "
        "key_file must be readable PEM files, the key must fit the certificate and have no "
        "password"
    )


def alert(text: str) -> str:
    """What an error of OpenSSL says about our certificate; "" if nothing."""
    plain = text.lower().replace("_", " ")
    said = (meaning for name, meaning in _ALERTS.items() if name in plain)
    return next((f"the broker refuses this client's certificate: {each}" for each in said), "")


def reason(fault: Exception, *, secure: bool) -> str:
    """What went wrong. A port without TLS may fail in many ways when it is spoken to in TLS."""
    plain = (ssl.SSLCertVerificationError, ConnectionRefusedError, socket.gaierror, LinkError)
    if isinstance(fault, ssl.SSLCertVerificationError) and "not yet valid" in str(fault):
        now = time.strftime("%Y-%m-%d", time.gmtime())
        return (
            f"its certificate is not yet valid, and this machine's clock says {now}: set the clock "
            "(sudo timedatectl set-ntp true)"
        )
    if secure and not isinstance(fault, plain):
        return f"{fault}; does it speak TLS on that port?"
    return str(fault)
