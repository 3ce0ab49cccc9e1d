"""How the devices' weights or updates of a round are averaged."""

from dataclasses import dataclass
from typing import Literal

from orchestrator.config.ranges import expect


@dataclass(frozen=True)
class AverageConfig:
    """How the devices' weights or updates of a round are averaged; see `models.robust`.

    Attributes:
        rule: "mean" weights devices by their samples (`cohort.max_weight`). A few hostile devices
            cannot move the others far: "median", "trimmed_mean", "multi_krum".
        hostile: the share of devices that trimmed_mean and multi_krum withstand.
        clip: most length of a device's update of a tensor, as a multiple of the median device's;
            longer ones are scaled down. 0: any.
    """

    rule: Literal["mean", "median", "trimmed_mean", "multi_krum"] = "mean"
    hostile: float = 0.2
    clip: float = 0.0

    def __post_init__(self) -> None:
        expect("hostile", self.hostile, 0 <= self.hostile < 0.5, "0 or more and below 0.5")
        expect("clip", self.clip, self.clip >= 0, "0 or more")

    @property
    def robust(self) -> bool:
        """Whether it is more than the mean weighted by samples."""
        return self.rule != "mean" or self.clip > 0
