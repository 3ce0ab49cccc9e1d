"""The configuration of a whole run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.broker import BrokerConfig
from orchestrator.config.cohort import CohortConfig
from orchestrator.config.device import DeviceConfig, Recipe
from orchestrator.config.release import ReleaseConfig
from orchestrator.config.server import ServerConfig
from orchestrator.config.submodel import SubmodelConfig
from orchestrator.config.transfer import TransferConfig
from wire import records, topics
from wire.errors import SettingsError
from wire.names import anchored


@dataclass(frozen=True)
class RunConfig:
    """The configuration of one run.

    Attributes:
        name: of the run, and of its folder under `runs`.
        fleet: the fleet whose devices may take part.
        strategy: the algorithm: one of ours ("fedgkt", "fedavg", "feddropout", "local") or your own
            (`orchestrator.strategies.registry`). It also checks the settings that concern it.
        strategy_settings: settings of your own strategy, which defines the keys.
        rounds: how many.
        heldout: images that the server evaluates on (.npz or folder). None: it evaluates on feature
            maps and logits of images that devices hold out (`device.holdout`; fedgkt).
        heldout_limit: most held-out images to use, evenly spread; 0: all.
        pretrained: the folder of a run whose global model (fedavg, feddropout) gives all models
            their initial weights, for the layers that they share (`models.inherit`). None: random
            weights.
        runs: folder of all runs.
        admission: "open" takes any device that the broker lets in; "enrolled" takes only devices
            that `orchestrator enroll` admitted.
        seed: of initial weights, shuffling, augmentation and stochastic rounding.
        chunk_bytes: size of the pieces that devices pull.
        transfer_chunks: chunks on their way up at once, all devices together.
        retry_s: a chunk that has not come up after this time is asked for again.
        max_upload_bytes: payloads of feature maps or logits above this are refused.
    """

    name: str
    heldout: Path | None = None
    fleet: str = "fleet"
    strategy: str = "fedgkt"
    rounds: int = 10
    heldout_limit: int = 0
    pretrained: Path | None = None
    runs: Path = Path("runs")
    admission: Literal["open", "enrolled"] = "enrolled"
    seed: int = 0
    chunk_bytes: int = 128 * 1024
    transfer_chunks: int = 32
    retry_s: float = 15.0
    max_upload_bytes: int = 1 << 34
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    submodel: SubmodelConfig = field(default_factory=SubmodelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    strategy_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        topics.check_name(self.name, "run name")
        topics.check_name(self.fleet, "fleet name")
        if not 1 <= self.rounds < 1 << 20 or not 0 <= self.seed < 1 << 20:
            raise ValueError(f"expected rounds from 1 and seed from 0, both below {1 << 20}")
        if self.transfer_chunks < 2 or len(self.name) > 48:
            raise ValueError(
                f"transfer_chunks {self.transfer_chunks}, name of {len(self.name)} characters: "
                "expected 2 or more, and 48 at most"
            )
        if not 1024 <= self.chunk_bytes <= 1 << 19:
            raise ValueError(f"chunk_bytes: expected 1024 to {1 << 19}, got {self.chunk_bytes}")
        if not 0 < self.retry_s < math.inf:
            raise ValueError(f"retry_s: expected over 0, got {self.retry_s}")

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What devices train: every recipe, without repeats."""
        device = self.device
        made = [Recipe(device.network, rate) for rate in sorted(self.submodel.rates)]
        made += [Recipe(name) for name in device.models[1:]]
        if self.transfer.freeze_after is not None:
            made += [Recipe(name, frozen=True) for name in device.models]
        return tuple(dict.fromkeys(made))

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.runs / self.name


def load(path: Path, check: Callable[[RunConfig], None] = lambda _: None) -> RunConfig:
    """Read `run.toml`; relative paths in it are relative to its folder, networks' paths too.

    Args:
        path: of the file.
        check: checks the settings that concern the strategy (`strategies.check`); it raises
            SettingsError.

    Raises:
        SettingsError: the message names the file, the key and what was expected.
    """
    config = records.load(RunConfig, path)
    folder = path.resolve().parent
    packages = tuple(folder / package for package in config.release.packages)
    device, server = config.device, config.server
    others = tuple(replace(o, model=anchored(o.model, folder)) for o in device.others)
    try:
        broker = config.broker.beside(folder)
    except ValueError as fault:
        raise SettingsError(f"{path}: broker: {fault}") from fault
    config = replace(
        config,
        strategy=anchored(config.strategy, folder),
        broker=broker,
        device=replace(device, model=anchored(device.model, folder), others=others),
        server=replace(server, model=anchored(server.model, folder)),
        release=replace(config.release, packages=packages),
        heldout=config.heldout and folder / config.heldout,
        pretrained=config.pretrained and folder / config.pretrained,
        runs=folder / config.runs,
    )
    try:
        check(config)
    except SettingsError as fault:
        raise SettingsError(f"{path}: {fault}") from fault
    return config
