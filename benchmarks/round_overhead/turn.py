"""What a contender is asked for, and what it hands back after its turn."""

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
    """So many devices do so many rounds after a first one; `weighed` looks at their memory."""

    devices: int
    rounds: int
    weighed: bool = False


@dataclass(frozen=True)
class Turn:
    """What a turn came to.

    Attributes:
        seconds: of each round after the first, from the end of the one before it to its own.
        returned: devices whose update is in the average, by round.
        bytes_up, bytes_down: of all devices together, by round; empty where nobody counts them.
        weights: where they were asked for.
    """

    seconds: tuple[float, ...]
    returned: tuple[int, ...]
    bytes_up: tuple[int, ...] = ()
    bytes_down: tuple[int, ...] = ()
    weights: Weights | None = None


Contender = Callable[[Plan, Path], Turn]
