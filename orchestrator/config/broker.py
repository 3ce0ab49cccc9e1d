"""The settings of the broker."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from orchestrator.config.ranges import expect
from wire.address import PORTS, BrokerAddress, bracketed, check_host, is_local


@dataclass(frozen=True)
class BrokerConfig:
    """Which broker a run uses, and how to reach it.

    Attributes:
        kind: "embedded" (pure Python, loopback only), "mosquitto" (the orchestrator runs Debian's
            mosquitto itself) or "external" (at `url`).
        host, port: where our own broker listens; host "" is every address of this machine, port 0
            a free port. Default: 8883 with TLS, else 1883.
        tls: whether our own mosquitto speaks mutual TLS, by certificates of the fleet's authority.
            Default: as soon as other machines can reach it.
        certificate_days: how long a device's certificate holds; it is renewed after two thirds.
        url: mqtt:// or mqtts:// URL of an external broker.
        username, password: the orchestrator's login at an external broker.
        ca_file, cert_file, key_file: PEM files, for mqtts.
    """

    kind: Literal["embedded", "mosquitto", "external"] = "embedded"
    host: str = "127.0.0.1"
    port: int | None = None
    tls: bool | None = None
    certificate_days: float = 90.0
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
        fits = 0.01 <= self.certificate_days <= 3650
        expect("certificate_days", self.certificate_days, fits, "0.01 to 3650")
        if self.tls and self.kind == "embedded":
            raise ValueError('tls: the embedded broker does not speak it; set kind = "mosquitto"')
        fits = self.port is None or 0 <= self.port <= 65535
        expect("port", self.port, fits, "1 to 65535, or 0 for a free one")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the broker."""
        return is_local(self.address().host if self.url else self.host)

    @property
    def mutual_tls(self) -> bool:
        """Whether our own broker takes certificates of the fleet's authority, and no passwords."""
        chosen = not self.local if self.tls is None else self.tls
        return self.kind == "mosquitto" and chosen

    @property
    def listens_on(self) -> int:
        """The port of our own broker; 0 for a free one."""
        return PORTS["mqtts" if self.mutual_tls else "mqtt"] if self.port is None else self.port

    @property
    def everywhere(self) -> bool:
        """Whether our own broker listens on every address of this machine."""
        return not self.url and (self.host in ("", "0.0.0.0", "::"))  # noqa: S104

    @property
    def device_url(self) -> str:
        """The URL by which devices reach the broker; "" if these settings do not tell it.

        They do not if our own broker listens on every address, or on a port chosen at its start.
        """
        if self.url or self.everywhere or not self.listens_on:
            return self.url
        return f"{self.scheme}://{bracketed(self.host)}:{self.listens_on}"

    @property
    def scheme(self) -> str:
        """The scheme of our own broker's URL: mqtts with TLS, else mqtt."""
        return "mqtts" if self.mutual_tls else "mqtt"

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
