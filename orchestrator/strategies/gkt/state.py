"""FedGKT's state: what is learnt, what the server holds from each device, and its checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from orchestrator.strategies.gkt.extractors import in_network, of_network
from orchestrator.strategies.strategy import Checkpoint, Weights, joined
from wire import records
from wire.errors import RunError
from wire.messages import BlobRef
from wire.names import written


@dataclass(frozen=True)
class Noted:
    """A record in a checkpoint's notes. Fields at their defaults are left out.

    Attributes:
        KEYS: the key in the notes of each field that has another one.
    """

    KEYS: ClassVar[Mapping[str, str]] = {}

    def pack(self) -> dict[str, Any]:
        """As JSON."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            self.KEYS.get(name, name): value
            for name, value in records.plain(self).items()
            if value != defaults[name]
        }

    @classmethod
    def unpack(cls, noted: Mapping[str, Any]) -> Self:
        """What was packed."""
        names = {key: name for name, key in cls.KEYS.items()}
        values = {names.get(key, key): value for key, value in noted.items()}
        return records.build(cls, values, where="checkpoint", error=RunError, strict=False)


@dataclass(frozen=True)
class HeldShard(Noted):
    """The payloads of one device that the server trains on, and how they were made.

    Attributes:
        round: of the order that the device last answered.
        data_digest: of the device's samples.
        features: blob of feature maps, logits and labels.
        logits: blob of newer logits of these rows; None: those beside the feature maps.
        rows: how many rows it has: one a sample, or two if it has plain and mirrored maps.
        view: the view that the first row of each sample shows.
        both_views: whether it has plain and mirrored maps, so that the server can crop. Maps of a
            single view show that view, whatever view is asked for.
        mirror: the order of channels in which a plain map, mirrored, is the map of the mirrored
            image (`extractors.mirror`), if the server crops plain maps alone; else None.
        moved: how far the device's extractor has moved since it made these feature maps
            (`extractors.moved`); None without `transfer.resend`.
    """

    KEYS: ClassVar = {"features": "ref", "rows": "samples", "both_views": "cropped"}

    round: int
    data_digest: str
    features: BlobRef
    logits: BlobRef | None
    rows: int
    view: int
    both_views: bool
    moved: float | None = None
    mirror: tuple[int, ...] | None = None

    @property
    def cropped(self) -> bool:
        """Whether the server crops and mirrors these maps."""
        return self.both_views or self.mirror is not None


@dataclass(frozen=True)
class Teacher(Noted):
    """The large model's logits z_s of one device's samples.

    Attributes:
        logits: their blob.
        data_digest: of the samples.
        view: the view of the samples that the large model saw.
    """

    KEYS: ClassVar = {"logits": "ref"}

    logits: BlobRef
    data_digest: str
    view: int


@dataclass(frozen=True)
class GktState:
    """What FedGKT has learnt.

    Attributes:
        server: W_s, the large model.
        optimizer: its optimizer's tensors (`optimizers.slots`).
        schedule: state of its learning-rate schedule, from PyTorch (`optimizers.Schedule.after`).
        devices: the last network that each device returned, by device.
        made_by: the extractor that made each device's feature maps in `held`, by device.
        shared_extractor: the extractor that all devices continue from; empty if each has its own.
        shared_heads: the W_c that devices with one model continue from, by model (as run.toml
            names it); empty if each has its own.
        held: the payloads that the server trains on, by device.
        teachers: the teacher logits that go to each device, by device.
    """

    server: Weights
    optimizer: Weights = field(default_factory=dict)
    schedule: Mapping[str, Any] | None = None
    devices: Mapping[str, Weights] = field(default_factory=dict)
    made_by: Mapping[str, Weights] = field(default_factory=dict)
    shared_extractor: Weights = field(default_factory=dict)
    shared_heads: Mapping[str, Weights] = field(default_factory=dict)
    held: Mapping[str, HeldShard] = field(default_factory=dict)
    teachers: Mapping[str, Teacher] = field(default_factory=dict)

    def with_heads(self, heads: Mapping[str, Weights]) -> "GktState":
        """The state with new shared W_c, by model as the run's settings name it."""
        named = {written(model): weights for model, weights in heads.items()}
        return replace(self, shared_heads={**self.shared_heads, **named})

    def shared(self, model: str) -> Weights:
        """The shared weights that devices with a model continue from, by their names in it."""
        head = self.shared_heads.get(written(model), {})
        return {**head, **in_network(self.shared_extractor)}

    def extractor(self, device: str) -> Weights:
        """The extractor that a device continues from: the shared one, or its last network's."""
        return self.shared_extractor or of_network(self.devices[device])

    def network(self, model: str, device: str) -> Weights:
        """The network that is evaluated for a device: the shared one, or the last it returned.

        A device continues from it too, unless only extractors are shared: then its next order
        replaces its extractor by the shared one.
        """
        return self.shared(model) if written(model) in self.shared_heads else self.devices[device]

    def pack(self) -> Checkpoint:
        """The state as a checkpoint, in the format used since the first version.

        Tensors are `server/...`, `optimizer/...`, `device/<name>/...`, `extractor/<name>/...`,
        `shared/...` (the extractor) and `network/<model>/...` (a shared W_c). Notes are "shards"
        (`held`), "teachers", "schedule" and "blobs".
        """
        packed = {
            "server": self.server,
            "optimizer": self.optimizer,
            "shared": self.shared_extractor,
            "device": joined(self.devices),
            "extractor": joined(self.made_by),
            "network": joined(self.shared_heads),
        }
        refs = [ref for held in self.held.values() for ref in (held.features, held.logits)]
        refs += [teacher.logits for teacher in self.teachers.values()]
        notes = {
            "shards": {name: held.pack() for name, held in self.held.items()},
            "teachers": {name: teacher.pack() for name, teacher in self.teachers.items()},
            "schedule": self.schedule,
            "blobs": sorted({ref.digest for ref in refs if ref}),
        }
        return Checkpoint(joined(packed), notes)

    @classmethod
    def unpack(cls, checkpoint: Checkpoint, models: Iterable[str]) -> "GktState":
        """The state from a checkpoint of a run whose devices train these models."""
        under, notes = checkpoint.under, checkpoint.notes
        heads = {written(model): under(f"network/{written(model)}") for model in models}
        return cls(
            server=under("server"),
            optimizer=under("optimizer"),
            schedule=notes.get("schedule"),
            devices=checkpoint.by_device("device"),
            made_by=checkpoint.by_device("extractor"),
            shared_extractor=under("shared"),
            shared_heads={model: weights for model, weights in heads.items() if weights},
            held={name: HeldShard.unpack(noted) for name, noted in notes["shards"].items()},
            teachers={name: Teacher.unpack(noted) for name, noted in notes["teachers"].items()},
        )
