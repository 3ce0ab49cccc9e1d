"""The settings of the broker."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from orchestrator.config.ranges import expect
from wire.address import BrokerAddress, bracketed, check_host, is_local


@dataclass(frozen=True)
class BrokerConfig:
    """Which broker a run uses, and how to reach it.

    Attributes:
        kind: "embedded" (pure Python, loopback only), "mosquitto" (the orchestrator runs Debian's
            mosquitto itself) or "external" (at `url`).
        host, port: where our own broker listens; host "" is every address of this machine, port 0
            a free port.
        url: mqtt:// or mqtts:// URL of an external broker.
        username, password: the orchestrator's login at an external broker.
        ca_file, cert_file, key_file: PEM files, for mqtts.
    """

    kind: Literal["embedded", "mosquitto", "external"] = "embedded"
    host: str = "127.0.0.1"
    port: int = 1883
    url: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.kind == "external") != bool(self.url):
            raise ValueError(
                f"kind {self.kind!r} {'with' if self.url else 'without'} url: an external broker, "
                "and only that, has a url"
            )
        if self.url:
            object.__setattr__(self, "url", self.address().url)
            return
        for name in ("username", "password", "ca_file", "cert_file", "key_file"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is for an external broker, and kind is {self.kind!r}: take it out"
                )
        if self.host:
            object.__setattr__(self, "host", check_host(self.host))
        expect("port", self.port, 0 <= self.port <= 65535, "1 to 65535, or 0 for a free one")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the broker."""
        return is_local(self.address().host if self.url else self.host)

    @property
    def everywhere(self) -> bool:
        """Whether our own broker listens on every address of this machine."""
        return not self.url and (self.host in ("", "0.0.0.0", "::"))  # noqa: S104

    @property
    def device_url(self) -> str:
        """The URL by which devices reach the broker; "" if these settings do not tell it.

        They do not if our own broker listens on every address, or on a port chosen at its start.
        """
        if self.url or self.everywhere or not self.port:
            return self.url
        return f"mqtt://{bracketed(self.host)}:{self.port}"

    def beside(self, folder: Path) -> "BrokerConfig":
        """The same settings, with relative file paths taken as relative to a folder.

        Raises:
            ValueError: a file is not there.
        """
        if not self.url:
            return self
        address = self.address().beside(folder)
        files = (address.ca_file, address.cert_file, address.key_file)
        return replace(self, ca_file=files[0], cert_file=files[1], key_file=files[2])

    def address(self) -> BrokerAddress:
        """The address of an external broker.

        Raises:
            ValueError: the url is wrong, or another setting does not fit it.
        """
        files = (self.ca_file, self.cert_file, self.key_file)
        return BrokerAddress(self.url, self.username, self.password, *files)
