"""Updates of the agent's package: which ones devices are told of, and in which order."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.ranges import expect
from wire import signing
from wire.errors import SignatureError


@dataclass(frozen=True)
class ReleaseConfig:
    """Updates of the agent's package.

    Attributes:
        key: the public key of the packages' signatures; `orchestrator enroll` gives it to devices.
        packages: .deb files, each with its .release.json beside it.
        canary: devices that are told first; empty: all are told at once.
        settle_minutes: the others are told once every device of `canary` has been there with the
            newer version for this long. Set it above the `update_minutes` of agent.toml.
    """

    key: str = ""
    packages: tuple[Path, ...] = ()
    canary: tuple[str, ...] = ()
    settle_minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.packages and not self.key:
            raise ValueError("release.key: name the public key that the packages are signed by")
        if self.key:
            try:
                signing.check_public(self.key)
            except SignatureError as fault:
                raise ValueError(f"release.key: {fault}") from fault
        expect("settle_minutes", self.settle_minutes, self.settle_minutes >= 0, "0 or more")
