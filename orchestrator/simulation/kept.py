"""What simulated devices keep from order to order, in the folder of their run.

    own/DEVICE/ROUND.safetensors      weights and optimizer of a device's own, after that round
    owed/DEVICE/SEQUENCE.safetensors  what the codec left out of that order's update

An agent keeps the same tensors, under other names (`edge_agent.kept`). Here an order may be done
anew, after a stop: what it begins with stays beside what came of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ondevice import kept
from ondevice.kept import KeptFile, Tensors
from ondevice.order import keeps_weights
from orchestrator.simulation.stack import SLOTS, STEPS
from wire.messages import Order

# Tensors' names in a file of own weights: `weights/...`, and `optimizer/...` by PyTorch's slots.
_FILED = {f"optimizer/{slot}/": prefix for slot, prefix in SLOTS.items()}
_FILED |= {"optimizer/step/": STEPS, "weights/": ""}


@dataclass(frozen=True)
class Kept:
    """The files of one run folder."""

    folder: Path

    def of(self, device: str, order: Order) -> KeptFile:
        """What this order goes on with, if there is any."""
        if order.feedback and order.owed:
            return KeptFile(self.folder / "owed" / device / _file(order.owed))
        if not keeps_weights(order):
            return KeptFile()
        before = self._before(device, order)
        path = self.folder / "own" / device / _file(before) if before else None
        return KeptFile(path, _named)

    def put(self, device: str, order: Order, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Keep what came of an order."""
        if order.feedback:
            folder, number, before = self.folder / "owed" / device, order.sequence, order.owed
        else:
            folder, number = self.folder / "own" / device, order.round
            before = self._before(device, order)
            tensors = {_filed(name): array for name, array in tensors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        kept.write(folder / _file(number), tensors)
        kept.keep_only([*folder.iterdir()], [_file(number), _file(before)])

    def _before(self, device: str, order: Order) -> int:
        """The last round before the order's that left weights; 0: none."""
        files = (self.folder / "own" / device).glob("*.safetensors")
        return max((n for n in (int(path.stem) for path in files) if n < order.round), default=0)


def _file(number: int) -> str:
    return f"{number}.safetensors"


def _named(filed: Tensors) -> Tensors:
    """From the names in a file to those of a state."""
    return {
        prefix + name.removeprefix(start): array
        for name, array in filed.items()
        for start, prefix in _FILED.items()
        if name.startswith(start)
    }


def _filed(name: str) -> str:
    """From the name in a state to that in a file."""
    return next(
        start + name.removeprefix(prefix)
        for start, prefix in _FILED.items()
        if name.startswith(prefix)
    )
