"""What a device says about itself."""

from dataclasses import dataclass
from typing import Literal

from wire import checks, classes, topics
from wire.messages.limits import MAX_REQUEST_BYTES, check_state_id
from wire.release import Build


@dataclass(frozen=True)
class Platform:
    """The machine that the agent runs on; memory in bytes."""

    model: str
    machine: str
    cores: int
    memory_bytes: int
    python: str
    onnxruntime: str

    def __post_init__(self) -> None:
        checks.counts(cores=self.cores, memory_bytes=self.memory_bytes)
        checks.texts(
            model=self.model, machine=self.machine, python=self.python, onnxruntime=self.onnxruntime
        )


@dataclass(frozen=True)
class Birth:
    """A device has connected.

    Attributes:
        device: its name.
        session: counts the connections that this state folder has seen, this one included.
        version: of the agent.
        samples: how many images the device has.
        data_digest: names the samples and their order; teacher logits fit exactly these.
        platform: the machine.
        package: the package that installed the agent; None if there was none, or it is not known.
        update: what became of an update that is not installed; "" if there was none.
        classes: names of the classes in the order of the labels; () if labels are only numbers.
        classes_digest: replaces names that are too many to send (`wire.classes.digest`).
        state_id: a random name of the state folder. Sessions can only be compared within one
            folder. "" comes from an agent that does not name its folder; its sessions are compared
            with each other.
    """

    device: str
    session: int
    version: str
    samples: int
    data_digest: str
    platform: Platform
    package: Build | None = None
    update: str = ""
    classes: tuple[str, ...] = ()
    classes_digest: str = ""
    state_id: str = ""

    def __post_init__(self) -> None:
        topics.check_name(self.device, "device name")
        check_state_id(self.state_id)
        checks.counts(session=self.session, samples=self.samples - 1)
        checks.texts(version=self.version)
        checks.digest("data_digest", self.data_digest)
        object.__setattr__(self, "classes", classes.normalized(self.classes))
        if classes.size(self.classes) > classes.MAX_TOLD_BYTES:
            raise ValueError(
                f"classes: expected names of {classes.MAX_TOLD_BYTES} bytes at most, got "
                f"{classes.size(self.classes)}; send classes_digest instead"
            )
        checks.optional_digest("classes_digest", self.classes_digest)


@dataclass(frozen=True)
class Death:
    """The connection of this session has ended (the device's last will); see `Birth`."""

    device: str
    session: int
    state_id: str = ""

    def __post_init__(self) -> None:
        check_state_id(self.state_id)


@dataclass(frozen=True)
class Telemetry:
    """How far a device is: `done` of `total` steps (or bytes) of a phase."""

    device: str
    run: str
    round: int
    phase: Literal["idle", "fetch", "train", "extract"]
    done: int
    total: int
    memory_bytes: int


@dataclass(frozen=True)
class Measured:
    """A measurement of training on the device (`wire.measurement`).

    The frame's body is its JSON; `digest` is the SHA-256 of that.
    """

    device: str
    digest: str

    def __post_init__(self) -> None:
        topics.check_name(self.device, "device name")
        checks.digest("digest", self.digest)


@dataclass(frozen=True)
class Sign:
    """Asks for a certificate, by a request (PKCS #10, DER).

    Attributes:
        request: signed with the key that the certificate is for.
        proof: the request, signed with the key of the kit's claim, or of the certificate that is
            to be renewed; ECDSA with SHA-256 for a key on a curve of NIST.
    """

    request: bytes
    proof: bytes

    def __post_init__(self) -> None:
        checks.within("request", len(self.request), 1, MAX_REQUEST_BYTES, " bytes")
        checks.within("proof", len(self.proof), 1, MAX_REQUEST_BYTES, " bytes")
