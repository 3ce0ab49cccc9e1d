"""Strategies by name, for `strategy` in run.toml.

fedgkt, fedavg, feddropout, local    ours
name                                 an entry point of the group `stillhouse.strategies`
path/to/file.py:Class                relative to run.toml
package.module:Class                 beside run.toml, in the current folder, or installed
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

from models import foreign
from models.foreign import Found, Kind
from orchestrator.config import RunConfig
from orchestrator.strategies.checked import checked
from orchestrator.strategies.fedavg import FedAvg
from orchestrator.strategies.feddropout import FedDropout
from orchestrator.strategies.fedgkt import FedGKT
from orchestrator.strategies.local import Local
from orchestrator.strategies.strategy import NEEDS, Strategy
from orchestrator.strategies.task import Task, strategy_settings
from wire import records
from wire.errors import RunError, SettingsError, StillhouseError

STRATEGIES = Kind("stillhouse.strategies", "Class")
_OURS: dict[str, type[Strategy]] = {
    "fedgkt": FedGKT,
    "fedavg": FedAvg,
    "feddropout": FedDropout,
    "local": Local,
}
_FUNCTIONS = ("check", "begin", "restore", "orders", "admit", "aggregate")


def check(config: RunConfig) -> None:
    """Find the strategy of a configuration, and let it check the settings.

    Raises:
        SettingsError: no strategy has this name, it cannot be imported, it is not a strategy, or
            it refuses a setting; the message names the key.
    """
    try:
        cls = _find(config.strategy)
    except StillhouseError as fault:
        raise SettingsError(f"strategy: {fault}") from fault
    if config.strategy in _OURS:  # `Checked.check` reads those of a user's strategy
        strategy_settings(config, cls.settings)
    try:
        cls.check(config)
    except (ValueError, RunError) as fault:
        raise SettingsError(str(fault)) from fault


def create(name: str, task: Task) -> Strategy:
    """The strategy with this name, for a run.

    Raises:
        StillhouseError: no strategy has this name, it cannot be imported, or it fails.
    """
    make: Callable[[Task], Strategy] = _find(name)
    return make(task)


def needs(name: str) -> frozenset[str]:
    """What is to be made ready for a strategy, some of `NEEDS`; its class declares it.

    Raises:
        StillhouseError: no strategy has this name, or it cannot be imported.
    """
    return frozenset(getattr(_find(name), "needs", ()))


def sources(name: str) -> Mapping[str, str]:
    """SHA-256 of each source file of a user's strategy, by path; empty for ours."""
    found = None if name in _OURS else foreign.locate(name, STRATEGIES)
    return found.sources if found else {}


def _find(name: str) -> type[Strategy]:
    if name in _OURS:
        return _OURS[name]
    found = foreign.locate(name, STRATEGIES)
    if found is None:
        known = [*_OURS, *foreign.entry_points(STRATEGIES)]
        near = records.nearest(name, known)
        hint = f"; did you mean {near!r}?" if near else f"; or {STRATEGIES.forms}"
        raise StillhouseError(f"expected one of {', '.join(map(repr, known))}, got {name!r}{hint}")
    _inspect(found)
    return checked(found)


def _inspect(found: Found) -> None:
    """Refuse a user's class that lacks something that a strategy has."""
    cls, name = found.value, found.name
    if not isinstance(cls, type):
        raise StillhouseError(
            f"{name}: expected a class, got {type(cls).__name__}; CONTRIBUTING.md says what it has"
        )
    if not dataclasses.is_dataclass(getattr(cls, "settings", None)):
        raise StillhouseError(
            f"{name}: expected a dataclass as its attribute `settings`, got "
            f"{getattr(cls, 'settings', None)!r}; without settings of its own it is NoSettings"
        )
    declared: object = getattr(cls, "needs", frozenset())
    if not isinstance(declared, set | frozenset) or declared - NEEDS:
        raise StillhouseError(
            f"{name}: expected its attribute `needs` to be a set of some of "
            f"{', '.join(map(repr, sorted(NEEDS)))}, got {declared!r:.80}"
        )
    _accepts(name, cls, ("task",))
    for function in _FUNCTIONS:
        asked = inspect.signature(getattr(Strategy, function)).parameters
        arguments = tuple(argument for argument in asked if argument != "self")
        defined = getattr(cls, function, None)
        if not callable(defined):
            raise StillhouseError(f"{name}: has no function {function}({', '.join(arguments)})")
        bound = isinstance(inspect.getattr_static(cls, function), staticmethod | classmethod)
        _accepts(f"{name}: {function}", defined, arguments if bound else ("self", *arguments))


def _accepts(what: str, function: Callable[..., object], arguments: tuple[str, ...]) -> None:
    """Refuse a function that cannot be called with that many arguments."""
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments)
    except TypeError as fault:
        raise StillhouseError(
            f"{what}: expected it to take ({', '.join(arguments)}), got {signature}: {fault}"
        ) from fault
