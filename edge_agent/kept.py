"""What a device keeps of a run between its orders, as safetensors in the state folder.

    weights-RUN-SEQUENCE.safetensors  its own parameters, buffers and optimizer after that order
    owed-RUN-SEQUENCE.safetensors     what the codec left out of that order's update

The journal says which weights count; of what is owed, the two that the last order named are kept,
as its result may be accepted or not.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from edge_agent.journal import Journal
from wire import storage
from wire.messages import Order


class Kept:
    """The files of one state folder."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal

    def of(self, order: Order) -> Path | None:
        """What this order goes on with, if there is any."""
        if order.feedback:
            path = self._folder / _owed(order.run, order.owed)
            return path if path.exists() else None
        name = self._journal.weights_file(order.run)
        return self._folder / name if name else None

    def put(self, order: Order, tensors: Mapping[str, NDArray[Any]]) -> str | None:
        """Keep what came of an order; the weights file that its result is journalled with."""
        content = save({name: np.asarray(value) for name, value in tensors.items()})
        if not order.feedback:
            name = f"weights-{order.run}-{order.sequence}.safetensors"
            self._write(name, content)
            return name
        self._write(_owed(order.run, order.sequence), content)
        needed = {_owed(order.run, sequence) for sequence in (order.owed, order.sequence)}
        for path in self._folder.glob(f"owed-{order.run}-*"):
            if path.name not in needed:
                path.unlink()
        return None

    def tidy(self) -> None:
        """Remove the weights that the journal no longer refers to."""
        wanted = self._journal.weights_files()
        for path in self._folder.glob("weights-*"):
            if path.name not in wanted:
                path.unlink()

    def _write(self, name: str, content: bytes) -> None:
        """Write a file so that it is whole or absent, after a power cut too."""
        with storage.at(self._folder):
            storage.write(self._folder / name, content)


def _owed(run: str, sequence: int) -> str:
    return f"owed-{run}-{sequence}.safetensors"
