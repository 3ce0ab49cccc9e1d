"""Algorithms as frozen states and functions from state to state; the rest is the coordinator's."""

from collections.abc import Callable

from orchestrator.strategies.fedavg import FedAvg
from orchestrator.strategies.feddropout import FedDropout
from orchestrator.strategies.fedgkt import FedGKT
from orchestrator.strategies.local import Local
from orchestrator.strategies.strategy import Strategy, Task

__all__ = ["Strategy", "Task", "create"]

_STRATEGIES: dict[str, Callable[[Task], Strategy]] = {
    "fedavg": FedAvg,
    "feddropout": FedDropout,
    "fedgkt": FedGKT,
    "local": Local,
}


def create(name: str, task: Task) -> Strategy:
    """The strategy of a name that the configuration has checked."""
    return _STRATEGIES[name](task)
