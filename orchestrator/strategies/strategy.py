"""What a strategy is: a frozen state, and functions from state to state.

    begin -> state                                       before round 1
    orders(state) -> one order a device                  what each device of the cohort shall do
    admit(state, order, result) -> contribution          what one result adds, checked and decoded
    aggregate(state, contributions) -> state, metrics    the state after the round

A strategy does no I/O but blobs, and decoded feature maps in `Task.shard_folder`, which can be
made again from them: the coordinator talks to devices, journals and checkpoints. `state.pack()`
makes a checkpoint of the state, and `restore` takes it back.
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
    """A strategy's state as it lies on disk.

    Attributes:
        tensors: what is learnt, by name. `global/...` are the weights of a model that all devices
            train; `orchestrator export` and `pretrained` look for them.
        notes: the rest, as JSON holds it. The digests under "blobs" are of blobs that the state
            refers to, and that must be kept.
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
        """The tensors named `prefix/DEVICE/...`, by device, without both."""
        found: dict[str, dict[str, Array]] = {}
        for path, array in self.under(prefix).items():
            device, _, name = path.partition("/")
            found.setdefault(device, {})[name] = array
        return found


class LearntState(Protocol):
    """All that a strategy has learnt: a frozen dataclass of its own."""

    def pack(self) -> Checkpoint:
        """The state as a checkpoint holds it."""


class Contribution(Protocol):
    """What one accepted result adds to the aggregate: checked, decoded, of a type of its own."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, those of its arrays."""


@dataclass(frozen=True)
class NoSettings:
    """The settings of a strategy that has none of its own."""


class Strategy(Protocol):
    """See the module's docstring. It is made of a `Task` alone: `Momentum(task)`.

    The types of `state` and of the contributions are the strategy's own.

    Attributes:
        settings: a frozen dataclass that the table `[strategy_settings]` of run.toml is read into
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
        """The state before round 1; the same seed gives the same."""

    def restore(self, checkpoint: Checkpoint) -> LearntState:
        """The state that was packed."""

    def orders(
        self, state: Any, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """What each device of the cohort shall do, by its name."""

    def admit(self, state: Any, order: Order, result: Result) -> Contribution:
        """Check and decode what an order's result brings; its blobs are here.

        It may be called again for a result that was accepted, with the same state.

        Raises:
            AdmissionError, WireError: why it must not enter the aggregate.
        """

    def aggregate(
        self, state: Any, round_: int, results: Sequence[Result], contributions: Iterable[Any]
    ) -> tuple[LearntState, Metrics]:
        """Take in a round's accepted results.

        Args:
            state: before the round.
            round_: its number, from 1.
            results: one or more, in the order of device names.
            contributions: of these results, in their order. Those that fit into memory were kept
                at admission; the others are decoded again as they are asked for.

        Returns:
            The next state, and metrics: "server_accuracy" and "device_accuracy" on held-out
            images, from 0 to 1, where they exist, and "devices" with those of each device.
        """
