"""A user's strategy, wrapped so that its faults name the line in the user's files.

An exception that it raises becomes a RunError of one line, "begin fails at momentum.py:5: KeyError:
'w'". Our own errors pass as they are: they already say what is wrong. Return values are checked at
once, since a wrong None would otherwise fail much later, somewhere in Stillhouse.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, ClassVar

import numpy as np

from models.foreign import Found, place_of
from orchestrator.config import RunConfig
from orchestrator.strategies.strategy import (
    Checkpoint,
    Contribution,
    LearntState,
    Metrics,
    Strategy,
)
from orchestrator.strategies.task import Task, strategy_settings
from wire import records, storage
from wire.errors import RunError, StillhouseError
from wire.messages import Birth, Order, Result


def checked(found: Found) -> type[Strategy]:
    """The user's class, wrapped in `Checked`."""

    class Users(Checked):
        users = found
        settings = found.value.settings
        needs: ClassVar[frozenset[str]] = frozenset(getattr(found.value, "needs", ()))

    return Users


@dataclass(frozen=True)
class _State:
    """A user's state, and its `pack` with faults told."""

    users: Any
    pack: Callable[[], Checkpoint]


class Checked:
    """Calls a user's strategy; see the module's docstring.

    Attributes:
        users: the user's class.
        settings, needs, task: as in `Strategy`.
    """

    users: ClassVar[Found]
    settings: ClassVar[type]

    def __init__(self, task: Task) -> None:
        self.task = task
        self._strategy: Strategy = self._call("__init__", self.users.value, task)

    @classmethod
    def check(cls, config: RunConfig) -> None:
        """Read the strategy's own settings, and let the user's class check all settings.

        Raises:
            ValueError: it refuses a setting.
            SettingsError: a setting of its own is wrong.
            RunError: it fails.
        """
        with cls._telling("settings"):
            strategy_settings(config, cls.settings)
        with cls._telling("check", passes=ValueError):
            cls.users.value.check(config)

    def begin(self) -> LearntState:
        """The user's state before round 1."""
        return self._state("begin", self._call("begin", self._strategy.begin))

    def restore(self, checkpoint: Checkpoint) -> LearntState:
        """The user's state from a checkpoint."""
        return self._state("restore", self._call("restore", self._strategy.restore, checkpoint))

    def orders(
        self, state: _State, round_: int, sequence: int, cohort: Mapping[str, Birth]
    ) -> dict[str, Order]:
        """The user's orders."""
        users = self._strategy.orders
        orders = self._call("orders", users, state.users, round_, sequence, cohort)
        if not isinstance(orders, dict) or not all(isinstance(o, Order) for o in orders.values()):
            raise self._expected("orders", "a dict of one Order a device", orders)
        if strangers := sorted(map(str, orders.keys() - cohort.keys())):
            raise RunError(
                f"{self._name('orders')}: expected orders to devices of the cohort, got one to "
                f"{strangers[0]!r:.80}"
            )
        return orders

    def admit(self, state: _State, order: Order, result: Result) -> Contribution:
        """A result's contribution; an AdmissionError or WireError means that it is refused."""
        contribution = self._call("admit", self._strategy.admit, state.users, order, result)
        size = self._call("admit", getattr, contribution, "nbytes", None)
        if not isinstance(size, Integral):
            raise self._expected("admit", "a contribution with a number `nbytes`", contribution)
        return contribution  # type: ignore[no-any-return]

    def aggregate(
        self, state: _State, round_: int, results: Sequence[Result], contributions: Iterable[Any]
    ) -> tuple[LearntState, Metrics]:
        """The user's next state and metrics."""
        users = self._strategy.aggregate
        done = self._call("aggregate", users, state.users, round_, results, contributions)
        if not (isinstance(done, tuple) and len(done) == 2 and isinstance(done[1], dict)):
            raise self._expected(
                "aggregate", "a pair of the next state and a dict of metrics", done
            )
        after, metrics = done
        devices = metrics.get("devices", {})
        if not isinstance(devices, dict) or not all(isinstance(m, dict) for m in devices.values()):
            what = "a dict of metrics for each device in ['devices']"
            raise self._expected("aggregate", what, devices)
        self._call("aggregate", json.dumps, metrics)  # they go into the report
        return self._state("aggregate", after), metrics

    def _pack(self, state: Any) -> Checkpoint:
        packed = self._call("pack", state.pack)
        if not isinstance(packed, Checkpoint):
            raise self._expected("pack", "a Checkpoint", packed)
        self._call("pack", json.dumps, records.plain(packed.notes))
        for name, array in packed.tensors.items():
            dtype = self._call("pack", np.asarray, array).dtype
            if dtype.kind not in "biufc":
                raise RunError(
                    f"{self._name('pack')}: expected arrays of numbers, got {dtype} in {name!r:.80}"
                )
        return packed

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._telling(name), storage.at(self.task.shard_folder):
            return function(*arguments)

    def _state(self, function: str, state: Any) -> LearntState:
        if not callable(getattr(state, "pack", None)):
            raise self._expected(function, "a state with a function pack()", state)
        return _State(state, partial(self._pack, state))

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
    def _telling(cls, function: str, passes: type[Exception] = MemoryError) -> Iterator[None]:
        try:
            yield
        except (StillhouseError, MemoryError, passes):
            raise
        except Exception as fault:
            where = place_of(fault, cls.users.scope, inspect.getsourcefile(cls.users.value) or "")
            raise RunError(f"{cls._name(function)} fails {where}") from fault
