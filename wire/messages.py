"""The messages, as frozen dataclasses; each travels as the header of a frame.

    device                              orchestrator
      | birth (retained) ----------------> |   on every connection, with a new session
      | <---------------------------- order |   what to train, from what, what to return
      | want -> / <- chunk                  |   the device pulls the blobs that the order names
      | telemetry -------------------------> |   how far it is
      | result ----------------------------> |   metrics, and the blobs that it offers
      |                  <- want / chunk -> |   the orchestrator pulls them at its own pace
      | <-------------------------- receipt |   accepted or refused, with the reason
      | <--------------------------- update |   a newer package, whose blob the device may pull
      | death (retained, last will) -------> |
      | measured (retained) --------------> |   what training costs there; taken from the broker
      | <-------------------------- receipt |   once the orchestrator has it

The device sends a result again until it has the receipt; the orchestrator sends an order again
when a device is born anew. Both are told apart by (run, sequence), so that repetition is harmless.

Agents and orchestrators of several versions talk: a message's key that has its default is not sent
(so no default ever changes), one that is not known is passed over. But an order or an update means
all that it says: with an unknown key it is refused, and the device answers an order that it cannot
read with that fault.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar

from wire import classes, frames, records, topics
from wire.errors import OrderError, WireError
from wire.frames import Frame, Kind
from wire.release import Build, Release

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STATE_ID = re.compile(r"[0-9a-f]{0,32}")
MAX_CHUNK_BYTES = frames.MAX_MESSAGE_BYTES - 4096
MAX_BLOB_BYTES = 1 << 36
MAX_WANT = 64
MAX_VIEWS = 16
MAX_TEXT = 256
MAX_COUNT = 1 << 53  # what SQLite, JSON and file offsets all take


@dataclass(frozen=True)
class BlobRef:
    """A blob by its content: SHA-256 (hex), size, and the size of the chunks it is pulled in."""

    digest: str
    size: int
    chunk_bytes: int

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"digest: expected 64 hex digits, got {self.digest!r:.80}")
        if not 0 <= self.size <= MAX_BLOB_BYTES:
            raise ValueError(f"size: expected 0 to {MAX_BLOB_BYTES} bytes, got {self.size}")
        if not 1024 <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise ValueError(
                f"chunk_bytes: expected 1024 to {MAX_CHUNK_BYTES}, got {self.chunk_bytes}"
            )

    @property
    def chunks(self) -> int:
        """How many chunks the blob has."""
        return -(-self.size // self.chunk_bytes)


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not 0 <= count < MAX_COUNT:
            raise ValueError(f"{name}: expected 0 to {MAX_COUNT - 1}, got {count}")


def check_noise(clip: float, noise: float) -> None:
    """Raise ValueError unless feature maps can be clipped and covered so."""
    if not (0 <= clip < math.inf and 0 <= noise < math.inf) or (noise and not clip):
        raise ValueError(
            f"clip {clip}, noise {noise}: expected 0 or more, and a clip over 0 where there is "
            "noise"
        )


def _check_digest(name: str, digest: str) -> None:
    if digest and not _DIGEST.fullmatch(digest):
        raise ValueError(f"{name}: expected 64 hex digits or nothing, got {digest!r:.80}")


def _check_texts(**texts: str) -> None:
    """People read these in a terminal and in Markdown."""
    for name, text in texts.items():
        if len(text) > MAX_TEXT or not text.isprintable():
            raise ValueError(f"{name}: expected up to {MAX_TEXT} printable, got {text!r:.80}")


@dataclass(frozen=True)
class Platform:
    """The machine under the agent; memory in bytes."""

    model: str
    machine: str
    cores: int
    memory_bytes: int
    python: str
    onnxruntime: str

    def __post_init__(self) -> None:
        _check_counts(cores=self.cores, memory_bytes=self.memory_bytes)
        _check_texts(
            model=self.model,
            machine=self.machine,
            python=self.python,
            onnxruntime=self.onnxruntime,
        )


def _check_state_id(state_id: str) -> None:
    if not _STATE_ID.fullmatch(state_id):
        raise ValueError(f"state_id: expected up to 32 hex digits, got {state_id!r:.80}")


@dataclass(frozen=True)
class Birth:
    """A device is there. `session` grows with every connection that its state folder sees.

    `state_id` names that folder, at random; sessions of two folders say nothing about which came
    first. "" is an agent that names none, and counts alone.
    `data_digest` names the samples and their order; teacher logits are meant for exactly these.
    `package` is what the agent was installed by, None where it was not, or says nothing of it;
    `update` says what became of an update that it does not have, "" where there was none.
    `classes` are the names of its classes in the order of its labels, () where labels are numbers
    alone; `classes_digest` stands for names that are too many to send (`wire.classes.digest`).
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
        _check_state_id(self.state_id)
        _check_counts(session=self.session, samples=self.samples - 1)
        _check_texts(version=self.version)
        if not _DIGEST.fullmatch(self.data_digest):
            raise ValueError(f"data_digest: expected 64 hex digits, got {self.data_digest!r:.80}")
        object.__setattr__(self, "classes", classes.normalized(self.classes))
        if classes.size(self.classes) > classes.MAX_TOLD_BYTES:
            raise ValueError(
                f"classes: expected names of {classes.MAX_TOLD_BYTES} bytes at most, got "
                f"{classes.size(self.classes)}; send classes_digest instead"
            )
        _check_digest("classes_digest", self.classes_digest)


@dataclass(frozen=True)
class Death:
    """The connection of this session has ended (the device's last will); see `Birth`."""

    device: str
    session: int
    state_id: str = ""

    def __post_init__(self) -> None:
        _check_state_id(self.state_id)


@dataclass(frozen=True)
class Order:
    """One piece of work. The agent knows work orders, not algorithms.

    Attributes:
        run, sequence: name the order; a higher sequence of the same run replaces a lower one.
        round: of the run, for people.
        artifact: the manifest of the training artifact.
        state: parameters and buffers to start from, with a fresh optimizer; those that it leaves
            out are the artifact's initial ones. None means the device's own, optimizer included,
            or the artifact's initial ones at first.
        own: `state` is laid over the device's own weights instead, which keep their optimizer.
        teacher: logits (N, C) float32 in the order of the device's samples, or None.
        data_digest: the samples that `teacher` belongs to; "" when there is no teacher.
        epochs: passes over the device's samples; 0 trains nothing.
        lr: learning rate.
        alpha: weight of the distillation term; 0 turns it off (FedGKT).
        temperature: softens both softmaxes of the distillation term.
        mu: weight of the proximal term; over 0 takes an artifact that has one (FedProx).
        submodel: names the kept units of the sub-model that `state` is, "" for the whole model;
            the result repeats it (Federated Dropout).
        feedback: keep what the codec of the update leaves out (error feedback),
        owed: and add what was left out by the order of this sequence, the last of this device's
            whose update was aggregated; 0: nothing.
        augment: random crop (padding 4) and horizontal flip of each training image, anew in each
            epoch.
        view: which view of the images is trained on, and `teacher` belongs to: 0 is the images as
            they are, 1 mirrored, and any other number the seed of a crop and flip of each image;
            `augment` is then of no effect. See `ondevice.views.looks`.
        holdout: share of the samples that is not trained on, but evaluated on; see
            `ondevice.views.held_out`.
        clip: feature maps longer than this (L2 norm of a sample's) are scaled down to it; 0: none.
        noise: deviation of the Gaussian noise that is added to each of their values then, as a
            multiple of `clip`; negative values become 0. Logits and weights get none.
        views: of which views features and logits are returned, one after the other.
        seed: of shuffling, augmentation and stochastic rounding.
        returns: what to send back and the codec spec of each: "state" (parameters and buffers),
            "update" (their difference to `state`), "features" (with logits and labels, in
            evaluation mode, in the order of the samples), "logits" (of these alone).
    """

    run: str
    sequence: int
    round: int
    artifact: BlobRef
    epochs: int
    lr: float
    seed: int
    returns: Mapping[str, str]
    state: BlobRef | None = None
    teacher: BlobRef | None = None
    data_digest: str = ""
    alpha: float = 0.0
    temperature: float = 1.0
    mu: float = 0.0
    augment: bool = False
    view: int = 0
    holdout: float = 0.0
    clip: float = 0.0
    noise: float = 0.0
    views: tuple[int, ...] = (0,)
    own: bool = False
    submodel: str = ""
    feedback: bool = False
    owed: int = 0

    def __post_init__(self) -> None:
        topics.check_name(self.run, "run name")
        _check_counts(
            sequence=self.sequence - 1,
            round=self.round,
            epochs=self.epochs,
            seed=self.seed >> 10,
            owed=self.owed,
            view=self.view,
        )
        unknown = set(self.returns) - {"state", "update", "features", "logits"}
        if unknown:
            raise ValueError(f"returns: cannot return {', '.join(sorted(unknown))}; known are "
                             "state, update, features, logits")  # fmt: skip
        if not 1 <= len(self.views) <= MAX_VIEWS or not all(0 <= v < MAX_COUNT for v in self.views):
            raise ValueError(f"views: expected 1 to {MAX_VIEWS} numbers from 0 on")
        if {"features", "logits"} <= set(self.returns):
            raise ValueError("returns: features come with their logits; name one of the two")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout: expected a share from 0 to below 1, got {self.holdout}")
        check_noise(self.clip, self.noise)
        if self.own and "update" in self.returns:
            raise ValueError("returns: an update is a difference to `state`, which is not whole")
        if "update" in self.returns and self.state is None:
            raise ValueError("returns: an update is a difference to `state`, and none is given")
        if self.feedback and "update" not in self.returns:
            raise ValueError("feedback: error feedback is of an update, and none is to be returned")
        _check_digest("submodel", self.submodel)


@dataclass(frozen=True)
class Result:
    """What came of an order: blobs by the name in `Order.returns`, or `fault` and nothing else.

    `submodel` is that of the order: an update is pasted by it.
    """

    device: str
    run: str
    sequence: int
    round: int
    samples: int
    data_digest: str = ""
    blobs: Mapping[str, BlobRef] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""
    submodel: str = ""

    def __post_init__(self) -> None:
        _check_counts(sequence=self.sequence, round=self.round, samples=self.samples)
        _check_digest("submodel", self.submodel)


@dataclass(frozen=True)
class Receipt:
    """The orchestrator's word on a birth, a result or a measurement; `reason`: why it was refused.

    `run` and `sequence` name the result; of a measurement, `run` is the digest of its JSON.
    """

    subject: Literal["birth", "result", "measured"]
    accepted: bool
    run: str = ""
    sequence: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Want:
    """Send these chunks of this blob; chunk numbers of one blob, at most `MAX_WANT`."""

    digest: str
    chunk_bytes: int
    chunks: tuple[int, ...]

    def __post_init__(self) -> None:
        BlobRef(self.digest, 0, self.chunk_bytes)
        most = MAX_BLOB_BYTES // self.chunk_bytes
        if not 1 <= len(self.chunks) <= MAX_WANT or not all(0 <= c <= most for c in self.chunks):
            raise ValueError(f"chunks: expected 1 to {MAX_WANT} numbers from 0 to {most}")


@dataclass(frozen=True)
class Chunk:
    """The frame's body is chunk `index` of the blob."""

    digest: str
    index: int


@dataclass(frozen=True)
class Gone:
    """The sender does not have this blob."""

    digest: str


@dataclass(frozen=True)
class Telemetry:
    """How far a device is: `done` of `total` steps (or bytes) of a phase."""

    device: str
    run: str
    round: int
    phase: Literal["idle", "fetch", "train", "extract", "send"]
    done: int
    total: int
    memory_bytes: int


@dataclass(frozen=True)
class Measured:
    """The frame's body is the JSON of a measurement (`wire.measurement`), `digest` its SHA-256."""

    device: str
    digest: str

    def __post_init__(self) -> None:
        topics.check_name(self.device, "device name")
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"digest: expected 64 hex digits, got {self.digest!r:.80}")


@dataclass(frozen=True)
class Hello:
    """The orchestrator is there (again): be born, offer what is unreceipted, go on pulling.

    Orchestrators say it to each other as well, to learn who has the fleet (`fleet.claim`).

    Attributes:
        boot: names the process.
        run: that it does.
        answers: the boot of the one that is answered; "" where nobody is.
    """

    boot: str
    run: str = ""
    answers: str = ""

    def __post_init__(self) -> None:
        _check_texts(boot=self.boot, run=self.run, answers=self.answers)


@dataclass(frozen=True)
class Update:
    """A newer package of the agent: the device checks its signature, and pulls it when it rests."""

    release: Release
    chunk_bytes: int

    def __post_init__(self) -> None:
        BlobRef(self.release.package.sha256, 0, self.chunk_bytes)

    @property
    def blob(self) -> BlobRef:
        """The package file."""
        package = self.release.package
        return BlobRef(package.sha256, package.size, self.chunk_bytes)


Message = (
    Birth
    | Death
    | Order
    | Result
    | Receipt
    | Want
    | Chunk
    | Gone
    | Telemetry
    | Hello
    | Update
    | Measured
)
M = TypeVar("M", bound=Message)

_KINDS: dict[Kind, type[Message]] = {
    Kind.BIRTH: Birth,
    Kind.DEATH: Death,
    Kind.ORDER: Order,
    Kind.RESULT: Result,
    Kind.RECEIPT: Receipt,
    Kind.WANT: Want,
    Kind.CHUNK: Chunk,
    Kind.GONE: Gone,
    Kind.TELEMETRY: Telemetry,
    Kind.HELLO: Hello,
    Kind.UPDATE: Update,
    Kind.MEASURED: Measured,
}
_CLASSES = {cls: kind for kind, cls in _KINDS.items()}


def encode(message: Message, body: bytes | memoryview = b"") -> bytes:
    """The frame of a message; only `Chunk` and `Measured` have a body."""
    told = (f.name for f in fields(message) if getattr(message, f.name) != _default(f))
    header = {name: records.plain(getattr(message, name)) for name in told}
    return frames.encode(_CLASSES[type(message)], header, body)


def _default(field: "Field[Any]") -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def decode(data: bytes, *, sender: str) -> tuple[Message, memoryview]:
    """The message in a frame, and the frame's body.

    Raises:
        OrderError: an order that cannot be followed, but answered.
        WireError: not an intact frame, or a header that is not such a message; the text names
            `sender`.
    """
    frame: Frame = frames.decode(data)
    if frame.kind not in _KINDS:
        raise WireError(f"{frame.kind.name} frame from {sender} where a message was expected")
    where = f"{frame.kind.name} message from {sender}"
    cls, strict = _KINDS[frame.kind], frame.kind in (Kind.ORDER, Kind.UPDATE)
    try:
        made = records.build(cls, frame.header, where=where, error=WireError, strict=strict)
    except WireError as fault:
        if cls is Order and (named := _named(frame.header)):
            raise OrderError(str(fault), named.run, named.sequence, named.round) from fault
        raise
    return made, frame.body


def _named(header: Mapping[str, Any]) -> Result | None:
    """The start of an answer to an order that cannot be read, if it says which one it is."""
    naming = {key: header.get(key) for key in ("run", "sequence", "round")}
    with contextlib.suppress(WireError, ValueError):
        answer = {"device": "", "samples": 0, **naming}
        named = records.build(Result, answer, where="answer", error=WireError)
        topics.check_name(named.run, "run name")
        return named
    return None
