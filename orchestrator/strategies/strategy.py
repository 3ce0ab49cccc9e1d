"""What a strategy is: a frozen state, and functions from state to state.

    begin -> state                                       before round 1
    orders(state) -> one order a device                  what each device of the cohort must do
    admit(state, order, result) -> contribution          what one result adds, checked and decoded
    aggregate(state, contributions) -> state, metrics    the state after the round

A strategy's only I/O is blobs, and decoded feature maps in `Task.shard_folder`, which can be made
again from blobs. The coordinator talks to devices, and writes the journal and the checkpoints.
`state.pack()` turns the state into a checkpoint, and `restore` turns a checkpoint into a state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from orchestrator.config import RunConfig
from orchestrator.strategies.task import Task
from wire import tensors
from wire.messages import Birth, Order, Result

Array = NDArray[Any]
Weights = Mapping[str, Array]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A strategy's state as it is written to disk.

    Attributes:
        tensors: everything learnt, by name. `global/...` are the weights of a model that all
            devices train; `orchestrator export` and `pretrained` look for them.
        notes: the rest, as JSON values. "blobs" lists the digests of the blobs that the state
            refers to; these blobs are kept.
    """

    tensors: Weights
    notes: Mapping[str, Any] = field(default_factory=dict)

    def blobs(self) -> set[str]:
        """Digests of the blobs that the state refers to."""
        return set(self.notes.get("blobs", ()))

    def under(self, prefix: str) -> dict[str, Array]:
        """The tensors named `prefix/...`, without the prefix."""
        return tensors.strip_prefix(prefix, self.tensors)

    def by_device(self, prefix: str) -> dict[str, dict[str, Array]]:
        """The tensors named `prefix/DEVICE/NAME`, by device and then by NAME."""
        found: dict[str, dict[str, Array]] = {}
        for path, array in self.under(prefix).items():
            device, _, name = path.partition("/")
            found.setdefault(device, {})[name] = array
        return found


def joined(groups: Mapping[str, Weights]) -> dict[str, Array]:
    """The tensors of all groups, each named `GROUP/NAME`."""
    return {
        f"{group}/{name}": array
        for group, weights in groups.items()
        for name, array in weights.items()
    }


class LearntState(Protocol):
    """Everything that a strategy has learnt, as a frozen dataclass of its own."""

    def pack(self) -> Checkpoint:
        """The state as a checkpoint."""


class Contribution(Protocol):
    """What one accepted result adds to the aggregate, checked and decoded."""

    @property
    def nbytes(self) -> int:
        """Size of its arrays in memory, in bytes."""


NEEDS = frozenset({"teacher", "feature maps"})  # what a strategy may ask for; see `Strategy`


@dataclass(frozen=True)
class NoSettings:
    """The settings of a strategy without settings of its own."""


class Strategy(Protocol):
    """An algorithm; see the module's docstring. A `Task` is its only argument: `Momentum(task)`.

    The strategy chooses the types of `state` and of the contributions. A class may have an
    attribute `needs`, a set of what is to be made ready for it (`NEEDS`):

        "teacher"         devices' training steps learn from a teacher's logits beside labels
        "feature maps"    each device network has an extractor, and `server.model` takes its output

    Attributes:
        settings: a frozen dataclass; the table `[strategy_settings]` of run.toml is read into it
            (`Task.settings`).
        task: what it works with.
    """

    settings: ClassVar[type]
    task: Task

    @staticmethod
    def check(config: RunConfig) -> None:
        """Refuse settings that the strategy would ignore; called when run.toml is loaded.

        Raises:
            ValueError: the message names the key and the remedy.
        """

    def begin(self) -> LearntState:
        """The state before round 1; the same seed gives the same state."""

    def restore(self, checkpoint: Checkpoint) -> LearntState:
        """The state from a checkpoint that `pack` made."""

    def orders(
        self, state: Any, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """What each device of the cohort must do, by the device's name."""

    def admit(self, state: Any, order: Order, result: Result) -> Contribution:
        """Check and decode the result of an order; its blobs are in the store.

        It may be called again with the same state for a result that was accepted, while `aggregate`
        runs. It must accept it then too: an error there ends the run, because the verdict stands.

        Raises:
            AdmissionError, WireError: why the result must not enter the aggregate.
        """

    def aggregate(
        self, state: Any, round_: int, results: Sequence[Result], contributions: Iterable[Any]
    ) -> tuple[LearntState, Metrics]:
        """Aggregate a round's accepted results.

        Args:
            state: before the round.
            round_: its number, from 1.
            results: one or more, in the order of device names.
            contributions: one a result, in the same order. Contributions that fitted into memory
                were kept at admission; the others are decoded again when the iterator reaches them.

        Returns:
            The next state, and metrics: "server_accuracy" and "device_accuracy" on held-out
            images, from 0 to 1, if they exist, and "devices" with the metrics of each device.
        """
