"""Algorithms: frozen states, and functions from state to state. The coordinator does all else."""

from orchestrator.strategies.registry import check, create, needs, sources
from orchestrator.strategies.strategy import (
    Checkpoint,
    Contribution,
    LearntState,
    Metrics,
    NoSettings,
    Strategy,
)
from orchestrator.strategies.task import Task

__all__ = [
    "Checkpoint",
    "Contribution",
    "LearntState",
    "Metrics",
    "NoSettings",
    "Strategy",
    "Task",
    "check",
    "create",
    "needs",
    "sources",
]
