"""The files that a device keeps between the orders of a run, in its state folder.

    weights-RUN-SEQUENCE.safetensors  its own parameters, buffers and optimizer after that order
    owed-RUN-SEQUENCE.safetensors     what the codec left out of that order's update

The journal names the weights files that are in use. Two owed files are kept: the one that the last
order began with, and its own, because its result may be accepted or not.
"""

from pathlib import Path

from edge_agent.journal import Journal
from ondevice import kept
from ondevice.kept import KeptFile, Tensors
from ondevice.order import keeps_weights
from wire.messages import Order


class Kept:
    """The kept files of one state folder."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder, self._journal = folder, journal

    def of(self, order: Order) -> KeptFile:
        """The file from which this order continues, if there is one."""
        if order.feedback:
            path = self._folder / _owed(order.run, order.owed)
            return KeptFile(path if path.exists() else None)
        name = self._journal.weights_files().get(order.run) if keeps_weights(order) else None
        return KeptFile(self._folder / name if name else None)

    def put(self, order: Order, tensors: Tensors | None) -> str | None:
        """Write what an order leaves, if anything; return its weights file for the journal."""
        if tensors is None:
            return None
        if not order.feedback:
            name = f"weights-{order.run}-{order.sequence}.safetensors"
            kept.write(self._folder / name, tensors)
            return name
        kept.write(self._folder / _owed(order.run, order.sequence), tensors)
        needed = [_owed(order.run, sequence) for sequence in (order.owed, order.sequence)]
        kept.keep_only(self._folder.glob(f"owed-{order.run}-*"), needed)
        return None

    def tidy(self) -> None:
        """Remove the weights that the journal no longer refers to."""
        kept.keep_only(self._folder.glob("weights-*"), self._journal.weights_files().values())


def _owed(run: str, sequence: int) -> str:
    return f"owed-{run}-{sequence}.safetensors"
