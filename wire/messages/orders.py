"""Work for a device (`Order`), what came of it (`Result`), and the server's word (`Receipt`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from wire import checks, topics
from wire.checks import MAX_COUNT
from wire.messages.limits import MAX_METRICS, MAX_VIEWS, check_noise, shortened
from wire.messages.transfer import BlobRef

RETURNS = frozenset({"state", "update", "features", "logits"})  # what an order may ask for


@dataclass(frozen=True)
class Order:
    """One piece of work. The agent knows work orders, not algorithms.

    `state` and `own` say what the device starts from:

        state    own     weights                              optimizer
        given    false   `state`                              fresh
        given    true    its own, with `state` laid over      its own
        None     any     its own                              its own

    Its own are what it kept after an earlier order of the run with `own` or without `state`. Values
    that neither these nor `state` give are the artifact's initial ones.

    Attributes:
        run, sequence: name the order among the device's; a higher sequence of the same run replaces
            a lower one.
        round: the round that it was given in; the result repeats it, and its age is counted from
            it.
        artifact: the manifest of the training artifact.
        state: parameters and buffers, all or some; see the table.
        own: start from the device's own weights and optimizer; see the table.
        teacher: logits (N, C) float32 in the order of the device's samples, or None.
        data_digest: of the samples that the order is for, and `teacher` belongs to; "" takes any.
        epochs: passes over the device's samples; 0 trains nothing.
        lr: learning rate.
        alpha: weight of the distillation term; 0 turns it off (FedGKT).
        temperature: softens both softmaxes of the distillation term.
        mu: weight of the proximal term; over 0 needs an artifact that has one (FedProx).
        submodel: digest that names the kept units of the sub-model in `state`; "" for the whole
            model. The result repeats it (Federated Dropout).
        feedback: keep what the codec of the update leaves out (error feedback).
        owed: add what an earlier update left out: the sequence of this device's last order whose
            update was aggregated. 0 adds nothing.
        augment: random crop (padding 4) and horizontal flip of each training image, anew in each
            epoch.
        view: the view of the images to train on, which `teacher` belongs to: 0 is the images as
            they are, 1 mirrored, and any other number the seed of a crop and flip of each image.
            `augment` then has no effect. See `ondevice.views.looks`.
        holdout: share of the samples to evaluate on instead of training; see
            `ondevice.views.held_out`.
        clip: scale down each sample's feature maps to this L2 norm if they are longer; 0: do not.
        noise: standard deviation of the Gaussian noise added to each value of the clipped feature
            maps, as a multiple of `clip`; negative values then become 0. Logits and weights get
            none.
        views: the views to return features and logits of, one after the other.
        seed: seeds shuffling, augmentation and stochastic rounding.
        returns: what to send back, and the codec spec of each: "state" (parameters and buffers),
            "update" (their difference to `state`), "features" (with logits and labels, in
            evaluation mode, in the order of the samples), "logits" (without features and labels).
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
        checks.counts(
            sequence=self.sequence - 1,
            round=self.round,
            epochs=self.epochs,
            seed=self.seed >> 10,
            owed=self.owed,
            view=self.view,
        )
        unknown = set(self.returns) - RETURNS
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
        checks.optional_digest("submodel", self.submodel)


@dataclass(frozen=True)
class Result:
    """What came of an order.

    Attributes:
        device: who sends this.
        run, sequence, round, submodel: repeated from the order.
        samples: how many images the device has, those left out of training included.
        data_digest: names the samples and their order.
        blobs: what is sent back, by the names in `Order.returns`.
        metrics: loss, accuracy, time and so on, by name; at most `MAX_METRICS`.
        fault: why the order could not be carried out; then there are no blobs. What goes beyond
            `MAX_REASON` characters is cut off.
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
        checks.counts(sequence=self.sequence, round=self.round, samples=self.samples)
        checks.optional_digest("submodel", self.submodel)
        checks.within("metrics", len(self.metrics), 0, MAX_METRICS)
        checks.within("blobs", len(self.blobs), 0, len(RETURNS))
        for name in self.metrics:
            checks.texts(metrics=name)
        object.__setattr__(self, "fault", shortened(self.fault))


@dataclass(frozen=True)
class Receipt:
    """The orchestrator's answer to a birth, a result or a measurement.

    Attributes:
        subject: what is answered.
        accepted: whether it was accepted.
        run, sequence: name the result; for a measurement, `run` is the digest of its JSON.
        reason: why it was refused; cut off like a result's fault.
    """

    subject: Literal["birth", "result", "measured"]
    accepted: bool
    run: str = ""
    sequence: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", shortened(self.reason))
