"""A run's configuration: `run.toml` as frozen dataclasses, and a template of one."""

from orchestrator.config.cohort import BrokerConfig, CohortConfig
from orchestrator.config.device import (
    DeviceConfig,
    Other,
    Recipe,
    SubmodelConfig,
    Tier,
    cosine,
)
from orchestrator.config.release import ReleaseConfig
from orchestrator.config.run import DEFAULT, WHY_DEFAULT, RunConfig, load, presets, template
from orchestrator.config.server import ServerConfig, TransferConfig

__all__ = [
    "DEFAULT",
    "WHY_DEFAULT",
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
