"""The tensors that simulated devices keep from order to order, in their run's folder.

    own/DEVICE/ROUND.safetensors      a device's own weights and optimizer, after that round
    owed/DEVICE/SEQUENCE.safetensors  the codec's error in that order's update

An agent keeps the same tensors under other names (`edge_agent.kept`). A simulated order may be done
again after a stop, so the tensors from before the order are kept beside the new ones.
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
from wire import storage
from wire.messages import Order

# In files of own weights tensors are named `weights/...`, and `optimizer/...` by PyTorch's slots.
_FILED = {f"optimizer/{slot}/": prefix for slot, prefix in SLOTS.items()}
_FILED |= {"optimizer/step/": STEPS, "weights/": ""}


@dataclass(frozen=True)
class Kept:
    """The files of one run folder."""

    folder: Path

    def of(self, device: str, order: Order) -> KeptFile:
        """The file that this order continues from; it may name no file."""
        if order.feedback and order.owed:
            return KeptFile(self.folder / "owed" / device / _file(order.owed))
        if not keeps_weights(order):
            return KeptFile()
        before = self._before(device, order)
        path = self.folder / "own" / device / _file(before) if before else None
        return KeptFile(path, _named)

    def put(self, device: str, order: Order, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Keep the tensors that an order ended with."""
        if order.feedback:
            folder, number, before = self.folder / "owed" / device, order.sequence, order.owed
        else:
            folder, number = self.folder / "own" / device, order.round
            before = self._before(device, order)
            tensors = {_filed(name): array for name, array in tensors.items()}
        with storage.at(folder):
            folder.mkdir(parents=True, exist_ok=True)
        kept.write(folder / _file(number), tensors)
        kept.keep_only([*folder.iterdir()], [_file(number), _file(before)])

    def _before(self, device: str, order: Order) -> int:
        """The last round before the order's after which weights were kept; 0: none.

        After a rollback there may be later rounds alone: then the newest of them, as an agent keeps
        what it has learnt.
        """
        files = (self.folder / "own" / device).glob("*.safetensors")
        there = [int(path.stem) for path in files]
        before = [number for number in there if number < order.round]
        return max(before or [n for n in there if n > order.round], default=0)


def _file(number: int) -> str:
    return f"{number}.safetensors"


def _named(filed: Tensors) -> Tensors:
    """Tensors of a file, by their names in the artifact's state."""
    return {
        prefix + name.removeprefix(start): array
        for name, array in filed.items()
        for start, prefix in _FILED.items()
        if name.startswith(start)
    }


def _filed(name: str) -> str:
    """The name in a file of a tensor of the artifact's state."""
    return next(
        start + name.removeprefix(prefix)
        for start, prefix in _FILED.items()
        if name.startswith(prefix)
    )
