"""The plan of a contender's turn, and its result."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.round_overhead.memory import Weights

# caldas_cnn for 10 classes, layer by layer: 1,663,370 float32 values.
SHAPES = (
    (32, 1, 5, 5), (32,), (64, 32, 5, 5), (64,), (512, 3136), (512,), (10, 512), (10,),
)  # fmt: skip
VALUES = 1_663_370


@dataclass(frozen=True)
class Plan:
    """A number of devices, and of rounds after a first one; `weighed` measures their memory."""

    devices: int
    rounds: int
    weighed: bool = False

    @property
    def names(self) -> list[str]:
        """The devices' names."""
        return [f"device-{number}" for number in range(self.devices)]


@dataclass(frozen=True)
class Turn:
    """The result of a turn.

    Attributes:
        seconds: for each round after the first, the time from the end of the round before to its
            own end.
        returned: for each round, how many devices' updates are in the average.
        bytes_up, bytes_down: for each round, bytes of all devices together; empty if not counted.
        weights: memory, if the plan asked for it.
    """

    seconds: tuple[float, ...]
    returned: tuple[int, ...]
    bytes_up: tuple[int, ...] = ()
    bytes_down: tuple[int, ...] = ()
    weights: Weights | None = None


Contender = Callable[[Plan, Path], Turn]
