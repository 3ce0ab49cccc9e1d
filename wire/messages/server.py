"""What the orchestrator says of itself, of newer software, and of certificates."""

from dataclasses import dataclass

from wire import checks
from wire.messages.limits import shortened
from wire.messages.transfer import BlobRef
from wire.release import Release


@dataclass(frozen=True)
class Hello:
    """The orchestrator has connected.

    Devices answer with a birth, offer every result that has no receipt yet, and go on pulling.
    Orchestrators also greet each other, to learn which one has the fleet (`fleet.claim`).

    Attributes:
        boot: names the process.
        run: the run that it carries out.
        answers: the boot of the orchestrator that this one answers; "" if it answers none.
    """

    boot: str
    run: str = ""
    answers: str = ""

    def __post_init__(self) -> None:
        checks.texts(boot=self.boot, run=self.run, answers=self.answers)


@dataclass(frozen=True)
class Update:
    """Offers a newer package of the agent.

    The device checks the signature, and pulls the package when it has nothing else to do.
    """

    release: Release
    chunk_bytes: int

    def __post_init__(self) -> None:
        BlobRef(self.release.package.sha256, 0, self.chunk_bytes)

    @property
    def blob(self) -> BlobRef:
        """The package file."""
        package = self.release.package
        return BlobRef(package.sha256, package.size, self.chunk_bytes)


@dataclass(frozen=True)
class Renew:
    """The device's certificate ends soon: it makes a new key, and asks with `Sign`."""


@dataclass(frozen=True)
class Certificate:
    """Answers `Sign`.

    Attributes:
        request: SHA-256 of the request.
        pem: the certificate; "" if it is refused.
        reason: why it is refused.
    """

    request: str
    pem: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        checks.digest("request", self.request)
        object.__setattr__(self, "reason", shortened(self.reason))
