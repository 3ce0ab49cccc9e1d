"""A user's strategy, wrapped so that its faults name the line in the user's files.

An exception that it raises becomes a RunError of one line, "begin fails at momentum.py:5: KeyError:
'w'". Our own errors pass as they are: they already say what is wrong. Return values are checked at
once, since a wrong None would otherwise fail much later, somewhere in Stillhouse.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar

from models.foreign import Found, place_of
from orchestrator.config import RunConfig
from orchestrator.strategies.strategy import (
    Checkpoint,
    Contribution,
    LearntState,
    Metrics,
    Strategy,
)
from orchestrator.strategies.task import Task
from wire import storage
from wire.errors import RunError, StillhouseError
from wire.messages import Birth, Order, Result


def checked(found: Found) -> type[Strategy]:
    """The user's class, wrapped in `Checked`."""

    class Users(Checked):
        users = found
        settings = found.value.settings
        needs: ClassVar[frozenset[str]] = frozenset(getattr(found.value, "needs", ()))

    return Users


class Checked:
    """Calls a user's strategy; see the module's docstring.

    Attributes:
        users: the user's class.
        settings, task: as in `Strategy`.
    """

    users: ClassVar[Found]
    settings: ClassVar[type]

    def __init__(self, task: Task) -> None:
        self.task = task
        with self._telling("__init__"), storage.at(task.shard_folder):
            self._strategy: Strategy = self.users.value(task)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Let the user's class check the settings.

        Raises:
            ValueError: it refuses a setting.
            RunError: it fails.
        """
        refusal = None
        with cls._telling("check"):
            try:
                cls.users.value.check(config)
            except ValueError as fault:
                refusal = fault
        if refusal:
            raise refusal

    def begin(self) -> LearntState:
        """The user's state before round 1."""
        return self._state("begin", self._call("begin"))

    def restore(self, checkpoint: Checkpoint) -> LearntState:
        """The user's state from a checkpoint."""
        return self._state("restore", self._call("restore", checkpoint))

    def orders(
        self, state: Any, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """The user's orders."""
        orders = self._call("orders", state, round_, sequence, cohort)
        if not isinstance(orders, dict) or not all(isinstance(o, Order) for o in orders.values()):
            raise self._expected("orders", "a dict of one Order a device", orders)
        if strangers := sorted(map(str, orders.keys() - cohort.keys())):
            raise RunError(
                f"{self._name('orders')}: expected orders to devices of the cohort, got one to "
                f"{strangers[0]!r:.80}"
            )
        return orders

    def admit(self, state: Any, order: Order, result: Result) -> Contribution:
        """A result's contribution; an AdmissionError or WireError means that it is refused."""
        contribution = self._call("admit", state, order, result)
        with self._telling("admit"):
            size = getattr(contribution, "nbytes", None)
        if not isinstance(size, Integral):
            raise self._expected("admit", "a contribution with a number `nbytes`", contribution)
        return contribution  # type: ignore[no-any-return]

    def aggregate(
        self, state: Any, round_: int, results: Sequence[Result], contributions: Iterable[Any]
    ) -> tuple[LearntState, Metrics]:
        """The user's next state and metrics."""
        done = self._call("aggregate", state, round_, results, contributions)
        if not (isinstance(done, tuple) and len(done) == 2 and isinstance(done[1], dict)):
            raise self._expected(
                "aggregate", "a pair of the next state and a dict of metrics", done
            )
        return self._state("aggregate", done[0]), done[1]

    def _call(self, function: str, *arguments: Any) -> Any:
        with self._telling(function), storage.at(self.task.shard_folder):
            return getattr(self._strategy, function)(*arguments)

    def _state(self, function: str, state: Any) -> LearntState:
        if not callable(getattr(state, "pack", None)):
            raise self._expected(function, "a state with a function pack()", state)
        return state  # type: ignore[no-any-return]

    @classmethod
    def _expected(cls, function: str, what: str, got: object) -> RunError:
        return RunError(
            f"{cls._name(function)}: expected it to return {what}, got {type(got).__name__}"
        )

    @classmethod
    def _name(cls, function: str) -> str:
        return f"strategy: {cls.users.name}: {function}"

    @classmethod
    @contextmanager
    def _telling(cls, function: str) -> Iterator[None]:
        try:
            yield
        except (StillhouseError, MemoryError):
            raise
        except Exception as fault:
            where = place_of(fault, cls.users.scope, inspect.getsourcefile(cls.users.value) or "")
            raise RunError(f"{cls._name(function)} fails {where}") from fault
