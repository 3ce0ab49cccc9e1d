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

    def lacking(self, devices: int) -> str:
        """Why the rule would withstand nobody in a round of so many devices; "" if it does."""
        if self.rule not in ("trimmed_mean", "multi_krum"):
            return ""
        hostile = int(self.hostile * devices)
        if hostile < 1:
            return (
                f"of {devices} devices (cohort.min_devices) a share of {self.hostile:g} is nobody; "
                'raise hostile or min_devices, or take rule = "median"'
            )
        if self.rule == "multi_krum" and devices < 2 * hostile + 3:
            return (
                f"multi_krum needs {2 * hostile + 3} devices to withstand {hostile}, and "
                f'cohort.min_devices is {devices}; raise it, or take rule = "median"'
            )
        return ""

    @property
    def robust(self) -> bool:
        """Whether it is more than the mean weighted by samples."""
        return self.rule != "mean" or self.clip > 0
