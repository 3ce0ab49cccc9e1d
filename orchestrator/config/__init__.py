"""A run's configuration: `run.toml` as frozen dataclasses, and templates of it."""

from orchestrator.config.average import AverageConfig
from orchestrator.config.broker import BrokerConfig
from orchestrator.config.cohort import CohortConfig
from orchestrator.config.device import DeviceConfig, Other, Recipe, cosine
from orchestrator.config.presets import DEFAULT, WHY_DEFAULT, presets, template
from orchestrator.config.release import ReleaseConfig
from orchestrator.config.run import RunConfig, load
from orchestrator.config.server import ServerConfig
from orchestrator.config.submodel import SubmodelConfig, Tier
from orchestrator.config.transfer import TransferConfig

__all__ = [
    "DEFAULT",
    "WHY_DEFAULT",
    "AverageConfig",
    "BrokerConfig",
    "CohortConfig",
    "DeviceConfig",
    "Other",
    "Recipe",
    "ReleaseConfig",
    "RunConfig",
    "ServerConfig",
    "SubmodelConfig",
    "Tier",
    "TransferConfig",
    "cosine",
    "load",
    "presets",
    "template",
]
