"""What travels in FedGKT, and how often."""

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.ranges import codec, expect
from wire import codecs


@dataclass(frozen=True)
class TransferConfig:
    """What travels in FedGKT, and how often.

    Attributes:
        extractor: "own": each device trains its own (the paper); "shared": after each round all
            devices continue from the mean of their extractors.
        network: "own": each device trains its own (the paper); "shared": after each round all
            devices with the same model continue from the mean of their networks, as in FedAvg. It
            needs a shared extractor. The server's held-out images evaluate this mean; images that
            devices hold out evaluate each device's network before averaging.
        freeze_after: how many rounds the extractor is trained in. After that, a device sends
            feature maps once, and again when its data has changed. Otherwise it sends only logits,
            and not even these if nothing uses them: `server.alpha` is 0 and the held-out images are
            the server's. None: always trained (the paper).
        views: each round shows each sample in another crop, mirrored or not, and teacher logits are
            of the same view. Once the extractor is frozen, devices send feature maps of the plain
            and the mirrored image, and the server crops them itself.
        student_views: true: devices train on each round's view. False: devices train on their
            images as they are and get teacher logits of them, while the server still crops frozen
            feature maps.
        resend: feature maps are sent again only if the extractor's maps of held-out images have
            changed since by more than this share (squared error); 0: sent in every round.
        age_decay: a sample's weight in server training is multiplied by this for each round since
            the device last answered.
        logits: codec spec of logits that are sent without feature maps, and of teacher logits.
    """

    extractor: Literal["own", "shared"] = "own"
    network: Literal["own", "shared"] = "own"
    freeze_after: int | None = None
    views: bool = False
    student_views: bool = True
    resend: float = 0.0
    age_decay: float = 1.0
    logits: str = "float16"

    def __post_init__(self) -> None:
        if codec("logits", self.logits, codecs.parse).coder.lowest >= 0:
            raise ValueError(
                f"logits: {self.logits} takes no negative values; use float16, identity|q=8, ..."
            )
        if self.network == "shared" and self.extractor == "own":
            raise ValueError(
                'network: a shared one has a shared extractor; set extractor = "shared"'
            )
        after = self.freeze_after
        expect("freeze_after", after, after is None or after >= 0, "0 rounds or more")
        if not self.student_views and not (self.views and self.freeze_after is not None):
            raise ValueError(
                "student_views: without views and freeze_after there are none to do without"
            )
        expect("resend", self.resend, 0 <= self.resend < 1, "a share from 0 to below 1")
        expect("age_decay", self.age_decay, 0 < self.age_decay <= 1, "a factor over 0 to 1")
        if self.resend and self.views:
            raise ValueError("resend: with views every round shows other feature maps; leave one")

    def frozen(self, round_: int) -> bool:
        """Whether the extractor stays as it is in this round."""
        return self.freeze_after is not None and round_ > self.freeze_after
