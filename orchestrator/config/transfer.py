"""What travels in FedGKT, and how often."""

from dataclasses import dataclass
from typing import Literal

from wire import codecs


@dataclass(frozen=True)
class TransferConfig:
    """What travels in FedGKT, and how often.

    Attributes:
        extractor: "own": each device trains its own (the paper); "shared": after each round all
            devices go on with the mean of theirs.
        network: "own": each device trains its own (the paper); "shared": after each round all
            devices with the same model go on with the mean of theirs, FedAvg beside FedGKT. Wants
            a shared extractor. The server's held-out images evaluate this mean; images that devices
            hold out evaluate each device's network before it.
        freeze_after: the extractor is trained in so many rounds, then no more: feature maps travel
            once, and from then on logits alone. None: always trained (the paper).
        views: each round shows each sample in another crop, and mirrored or not, and teacher
            logits are those of the same view. Once the extractor is frozen, feature maps of the
            plain and the mirrored image travel, and the server crops them by itself.
        student_views: devices train on each round's view; false: on their images as they are, and
            teacher logits are those of them, while the server crops frozen feature maps all the
            same.
        resend: feature maps travel again only where those of held-out images have changed by more
            than this share (squared error) since; 0: in every round.
        age_decay: a sample's weight in server training for each round since the device last
            answered.
        logits: codec spec of logits, those that come without feature maps and those that go back.
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
        if codecs.parse(self.logits).coder.lowest >= 0:
            raise ValueError(
                f"logits: {self.logits} takes no negative values; use float16, identity|q=8, ..."
            )
        if self.network == "shared" and self.extractor == "own":
            raise ValueError(
                'network: a shared one has a shared extractor; set extractor = "shared"'
            )
        if self.freeze_after is not None and self.freeze_after < 0:
            raise ValueError(f"freeze_after: expected 0 rounds or more, got {self.freeze_after}")
        if not self.student_views and not (self.views and self.freeze_after is not None):
            raise ValueError(
                "student_views: without views and freeze_after there are none to do without"
            )
        if not 0 <= self.resend < 1 or not 0 < self.age_decay <= 1:
            raise ValueError(
                f"resend {self.resend}, age_decay {self.age_decay}: expected 0 <= resend < 1, "
                "0 < age_decay <= 1"
            )
        if self.resend and self.views:
            raise ValueError("resend: with views every round shows other feature maps; leave one")

    def frozen(self, round_: int) -> bool:
        """Whether the extractor stays as it is in this round."""
        return self.freeze_after is not None and round_ > self.freeze_after
