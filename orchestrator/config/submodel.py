"""The sub-models that devices train (Federated Dropout)."""

import fnmatch
from dataclasses import dataclass
from typing import Literal

from orchestrator.config.ranges import expect

KEEP_RATE = "over 0 to 1 (the whole model)"


@dataclass(frozen=True)
class Tier:
    """Devices that train at one keep rate.

    Attributes:
        keep_rate: 0 < keep_rate <= 1.
        devices: a pattern of device names, such as `zero-*`.
        memory_mb: only devices with at most this much memory; 0: any.
    """

    keep_rate: float
    devices: str = "*"
    memory_mb: int = 0

    def __post_init__(self) -> None:
        expect("keep_rate", self.keep_rate, 0 < self.keep_rate <= 1, KEEP_RATE)
        if self.memory_mb < 0 or (self.devices == "*" and not self.memory_mb):
            raise ValueError(
                "expected a pattern of names in `devices`, or `memory_mb` over 0: a tier of all "
                "devices is `submodel.keep_rate`"
            )

    def holds(self, device: str, memory_bytes: int) -> bool:
        """Whether a device belongs to this tier."""
        small = not self.memory_mb or memory_bytes <= self.memory_mb * 10**6
        return small and fnmatch.fnmatchcase(device, self.devices)


@dataclass(frozen=True)
class SubmodelConfig:
    """The sub-models that devices train (Federated Dropout).

    Attributes:
        keep_rate: p, the share of each hidden layer's units that a device outside all tiers trains.
        units: which units. "random": drawn for each device and round; "shared": drawn for each
            round; "ordered": always the first (FjORD, HeteroFL); "rolling": a window that moves
            with the rounds (FedRolex).
        absent: how the average treats a device that does not have a unit. "zero": as an update of
            zero (the paper); "holders": it is left out, the average is over devices with the unit.
        tiers: the first tier that a device belongs to gives its keep rate.
    """

    keep_rate: float = 1.0
    units: Literal["random", "shared", "ordered", "rolling"] = "random"
    absent: Literal["zero", "holders"] = "zero"
    tiers: tuple[Tier, ...] = ()

    def __post_init__(self) -> None:
        expect("keep_rate", self.keep_rate, 0 < self.keep_rate <= 1, KEEP_RATE)

    def rate_of(self, device: str, memory_bytes: int) -> float:
        """The keep rate of a device."""
        fits = (tier.keep_rate for tier in self.tiers if tier.holds(device, memory_bytes))
        return next(fits, self.keep_rate)

    @property
    def rates(self) -> frozenset[float]:
        """All keep rates that devices may have."""
        return frozenset({self.keep_rate, *(tier.keep_rate for tier in self.tiers)})

    @property
    def whole(self) -> bool:
        """Whether every device trains the whole model."""
        return self.rates == {1}
