"""Who takes part in a round, and when it ends."""

from dataclasses import dataclass

from orchestrator.config.ranges import expect


@dataclass(frozen=True)
class CohortConfig:
    """Who takes part in a round, and when it ends.

    Attributes:
        min_devices: a round begins only with this many devices.
        max_devices: most devices that are chosen; 0: all. To over-select, set `quorum` below 1.
        wait_s: once `min_devices` are there, how long to wait for `max_devices`.
        quorum: the round closes when this share of the cohort has returned.
        deadline_s: after this time the round closes with the devices that have returned.
        carry_rounds: how many more rounds an order stays open if it is not answered when its round
            closes. Its result counts in the round in which it arrives (fedgkt, local); until then
            the device gets no other order. 0: late results are refused.
        max_weight: in an average of weights, a device counts at most this many times as much as the
            median one, because nobody can check how many samples it claims to have.
    """

    min_devices: int = 2
    max_devices: int = 0
    wait_s: float = 10.0
    quorum: float = 1.0
    deadline_s: float = 600.0
    carry_rounds: int = 0
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        expect("carry_rounds", self.carry_rounds, self.carry_rounds >= 0, "0 or more")
        expect("max_weight", self.max_weight, self.max_weight >= 1, "1 or more")
        if self.min_devices < 1 or (self.max_devices and self.max_devices < self.min_devices):
            raise ValueError(
                f"min_devices {self.min_devices}, max_devices {self.max_devices}: expected "
                "1 <= min_devices <= max_devices, or max_devices = 0"
            )
        expect("quorum", self.quorum, 0 < self.quorum <= 1, "a share over 0 to 1")
        expect("deadline_s", self.deadline_s, self.deadline_s > 0, "over 0")
        expect("wait_s", self.wait_s, self.wait_s >= 0, "0 or more")
