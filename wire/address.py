"""A broker's address, as configurations hold it.

`parse` reads a URL once. Whether to use TLS, and which port, follows from what it read, never from
the text. No message repeats a secret that somebody wrote into a URL.
"""

import hashlib
import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

PORTS = {"mqtt": 1883, "mqtts": 8883}
MAX_SHOWN = 120  # characters of a URL in a message
MAX_SECRET_BYTES = 65535  # MQTT 3.1.1, section 1.5.3
EXPECTED = "expected mqtt://HOST[:PORT], or mqtts://HOST[:PORT] for TLS"
_URL = re.compile(r"([^:/?#@\[\]]+)://(\[[^\[\]]*\]|[^/?#\[\]]*?)(?::([^:/?#\[\]]*))?([/?#].*)?")
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,15}")  # of an IPv6 address: an interface's name or number
_AT = "(?:[@\uff20\ufe6b]|%40)"
# What stands in the port's place but may be a password, because the host was forgotten.
_NO_PORT = r":(?!//)(?![\d+_. -]{0,8}(?:[/?#\s]|$))"
_WEB = (
    "; HTTP and WebSockets are not spoken here: name the broker's own MQTT port, usually 1883 or "
    "8883"
)
_SCHEME_HINTS = {
    **dict.fromkeys(
        ("ssl", "tls", "mqtt+ssl", "mqtt+tls", "mqtts+ssl", "secure-mqtt"), "; write mqtts"
    ),
    **dict.fromkeys(("tcp", "mqtt+tcp"), "; write mqtt"),
    **dict.fromkeys(("ws", "wss", "http", "https"), _WEB),
}
_ROUNDS = 100_000
_FILES = ("ca_file", "cert_file", "key_file")


class Endpoint(NamedTuple):
    """A broker's URL, taken apart; `host` is a name, or an address without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        """The URL in its canonical form: lower case, with the port."""
        return f"{self.scheme}://{bracketed(self.host)}:{self.port}"


def bracketed(host: str) -> str:
    """A host as a URL has it: an IPv6 address gets brackets."""
    return f"[{host}]" if ":" in host else host


def redacted(text: str) -> str:
    """A URL that is safe to show: secrets become `***`, and odd characters are escaped.

    User info, query and fragment may be secrets, and so may whatever stands in the port's place
    and does not look like a port.
    """
    text = re.sub(
        rf"^(\s*[^:/?#@\s]*:/*)?.*{_AT}", lambda m: f"{m[1] or ''}***@", text, flags=re.DOTALL
    )
    if "***@" not in text:
        before = r"^(\s*(?:[^:/?#]*:/+)?(?:\[[^\[\]/]*\]|[^:/?#]*))"
        text = re.sub(before + _NO_PORT + ".*", r"\1:***", text, flags=re.DOTALL)
    text = re.sub(r"[?#].*", "?***", text, flags=re.DOTALL)
    return ascii(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def parse(url: str) -> Endpoint:
    """Read a broker's URL.

    Raises:
        ValueError: it is not mqtt://HOST[:PORT] or mqtts://HOST[:PORT]; the message says what to
            write.
    """
    shown = redacted(url)
    if url != url.strip():
        raise ValueError(f"url {shown}: spaces stand before or after it; take them out")
    if "@" in url or "%40" in url:
        raise ValueError(
            f"url {shown}: a user name or password does not belong in a URL; write them as "
            "`username` and `password` under [broker]"
        )
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"url {shown}: {EXPECTED}, in ASCII and without spaces{_ascii_hint(url)}")
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"url {shown}: {EXPECTED}{_hint(url)}")
    scheme, host, port, rest = match.groups()
    scheme = scheme.lower()
    if scheme not in PORTS:
        hint = _SCHEME_HINTS.get(scheme, "")
        raise ValueError(f"url {shown}: scheme {scheme!r}: {EXPECTED}{hint}")
    try:
        endpoint = Endpoint(
            scheme, _host(host), PORTS[scheme] if port is None else parse_port(port)
        )
    except ValueError as fault:
        raise ValueError(f"url {shown}: {fault}") from fault
    if rest not in (None, "/"):
        raise ValueError(f"url {shown}: {EXPECTED}, and nothing after the host and port")
    return endpoint


def parse_port(text: str) -> int:
    """The number of a port.

    Raises:
        ValueError: the text is not a number from 1 to 65535.
    """
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        shown = "" if re.match(_NO_PORT, f":{text}") else f" {text!r}"
        raise ValueError(f"port{shown}: expected a number from 1 to 65535")
    return int(text)


def check_host(host: str) -> str:
    """A host's name or address (IPv6 without brackets) in lower case, without a dot at its end.

    Raises:
        ValueError: it is neither a name nor an address.
    """
    plain, percent, zone = host.partition("%")
    if not percent or _ZONE.fullmatch(zone):
        with suppress(ValueError):
            return str(ipaddress.ip_address(plain)) + percent + zone
    labels = host.removesuffix(".").split(".")  # certificates are for names without the dot
    named = all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdecimal()
    if not named or len(host) > 253:
        raise ValueError(
            f"host {redacted(host):.80}: expected a name (letters, digits, '-', '_', '.') or an "
            "address"
        )
    return ".".join(labels).lower()


def is_local(host: str) -> bool:
    """Whether a host that `check_host` returned is the machine that connects to it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tag(secret: str | bytes) -> str:
    """The end of a client id that nobody can guess who lacks the secret.

    Brokers do not tie client ids to users: whoever connects with another client's id ends its
    connection, and takes its session. 16 hex digits; "" without a secret.
    """
    secret = secret.encode() if isinstance(secret, str) else secret
    if not secret:
        return ""
    # Slow on purpose: client ids stand in logs, and people choose passwords.
    return hashlib.pbkdf2_hmac("sha256", secret, b"stillhouse client id", _ROUNDS, 8).hex()


def client_id(fleet: str, user: str, tag: str) -> str:
    """A client's name at the broker; `tag` is of its credentials."""
    return "-".join(filter(None, ["stillhouse", fleet, user, tag]))


def _host(text: str) -> str:
    """The host of a URL, where an IPv6 address stands in brackets."""
    if not text:
        raise ValueError("the host is missing")
    if text.startswith("["):
        try:
            plain, percent, zone = text[1:-1].partition("%")
            ipaddress.IPv6Address(plain)
            if zone.startswith("25") and len(zone) > len("25"):  # "%" in a URL, RFC 6874
                zone = zone.removeprefix("25")
            address = check_host(plain + percent + zone)
        except ValueError as fault:
            raise ValueError(f"host {text}: expected an IPv6 address in the brackets") from fault
    elif ":" in text:
        raise ValueError(
            f"host {redacted(text)}: an IPv6 address stands in brackets, mqtt://[::1]:1883; "
            "elsewhere there is one ':', before the port"
        )
    else:
        address = check_host(text)
    if address in ("0.0.0.0", "::"):  # noqa: S104 - refused
        raise ValueError(
            f"host {address} stands for all addresses of a machine; nothing can connect to it: "
            "write the broker's name or address"
        )
    return address


def _hint(url: str) -> str:
    bare = re.fullmatch(r"(?:(mqtts?)[:/]+)?([A-Za-z0-9_.-]+(?::[0-9]+)?)/?", url, re.IGNORECASE)
    return f"; did you mean {(bare[1] or 'mqtt').lower()}://{bare[2]}?" if bare else ""


def _ascii_hint(url: str) -> str:
    """A hint with the ASCII form of an international host name; "" if more is wrong than that."""
    scheme, _, host = url.partition("://")
    try:
        text = f"{scheme}://{host.encode('idna').decode('ascii')}"
        wrong_elsewhere = url.isascii() or not text.isascii() or " " in text
        return "" if wrong_elsewhere else f"; did you mean {parse(text).url}?"
    except ValueError:  # UnicodeError is one
        return ""


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is, and who we are there.

    Attributes:
        url: mqtt://HOST[:PORT], or mqtts://HOST[:PORT] for TLS; kept in its canonical form.
        username, password: if the broker asks for them.
        ca_file, cert_file, key_file: PEM files for mqtts; the key may be in `cert_file`.
        scheme, host, port: the parts of the URL.
    """

    url: str
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    scheme: str = field(init=False, repr=False)
    host: str = field(init=False, repr=False)
    port: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        endpoint = parse(self.url)
        for name, value in {**endpoint._asdict(), "url": endpoint.url}.items():
            object.__setattr__(self, name, value)
        files = [name for name in _FILES if getattr(self, name)]
        if files and not self.secure:
            raise ValueError(f"{files[0]} is for TLS, and url {self.url} is not: write mqtts://")
        if self.key_file and not self.cert_file:
            raise ValueError("key_file without cert_file: name the key's certificate too")
        if self.password and not self.username:
            raise ValueError("password without username: MQTT does not allow that")
        for name in ("username", "password"):
            text = getattr(self, name)
            if "\0" in text or len(text.encode()) > MAX_SECRET_BYTES:
                raise ValueError(f"{name}: expected up to {MAX_SECRET_BYTES} bytes, without NUL")

    @property
    def secure(self) -> bool:
        """Whether the connection uses TLS."""
        return self.scheme == "mqtts"

    @property
    def tag(self) -> str:
        """The `tag` of our key or password."""
        path = self.key_file or self.cert_file
        with suppress(OSError):  # `Link` says so
            return tag(path.read_bytes() if path else self.password)
        return ""

    def beside(self, folder: Path) -> Self:
        """The same address, with files relative to a folder.

        Raises:
            ValueError: a file does not exist.
        """
        files = {name: folder / getattr(self, name) for name in _FILES if getattr(self, name)}
        for name, path in files.items():
            if not path.is_file():
                raise ValueError(f"{name}: no file {path}")
        return replace(self, **files)
