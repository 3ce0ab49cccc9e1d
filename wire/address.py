"""Where a broker is: the part of a connection that configurations hold."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is and who we are there.

    `url` is mqtt://host[:port] or mqtts://host[:port]; the files are PEM, for mqtts.
    """

    url: str
    username: str = ""
    password: str = ""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise ValueError(
                f"url {self.url!r}: expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]"
            )
        for name in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: no file {path}")

    @property
    def host(self) -> str:
        """The host name."""
        return urlsplit(self.url).hostname or ""

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken."""
        return self.url.startswith("mqtts:")

    @property
    def port(self) -> int:
        """The port, by default 1883, or 8883 with TLS."""
        return urlsplit(self.url).port or (8883 if self.secure else 1883)
