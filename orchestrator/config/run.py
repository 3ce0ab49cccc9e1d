"""The configuration of a whole run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.config.average import AverageConfig
from orchestrator.config.broker import BrokerConfig
from orchestrator.config.cohort import CohortConfig
from orchestrator.config.device import DeviceConfig, Recipe
from orchestrator.config.ranges import expect
from orchestrator.config.release import ReleaseConfig
from orchestrator.config.server import ServerConfig
from orchestrator.config.submodel import SubmodelConfig
from orchestrator.config.transfer import TransferConfig
from wire import records, topics
from wire.errors import SettingsError
from wire.names import anchored

LONGEST = 48  # characters of a run's name
MOST = 1 << 20  # rounds and seeds are below this


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
        keep_every: besides the newest two checkpoints and the best one, every so many-th is kept
            for `orchestrator rollback`. 0: none.
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
    keep_every: int = 0
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    submodel: SubmodelConfig = field(default_factory=SubmodelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    release: ReleaseConfig = field(default_factory=ReleaseConfig)
    strategy_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        topics.check_name(self.name, "run name")
        topics.check_name(self.fleet, "fleet name")
        expect("name", self.name, len(self.name) <= LONGEST, f"up to {LONGEST} characters")
        expect("rounds", self.rounds, 1 <= self.rounds < MOST, f"1 to {MOST - 1}")
        expect("seed", self.seed, 0 <= self.seed < MOST, f"0 to {MOST - 1}")
        expect("transfer_chunks", self.transfer_chunks, self.transfer_chunks >= 2, "2 or more")
        most = 1 << 19
        expect("chunk_bytes", self.chunk_bytes, 1024 <= self.chunk_bytes <= most, f"1024 to {most}")
        expect("retry_s", self.retry_s, self.retry_s > 0, "over 0")
        ours = self.broker.kind == "mosquitto" and not self.broker.local
        if ours and self.admission == "open" and not self.broker.mutual_tls:
            raise ValueError(
                'admission = "open" without TLS, and other machines reach the broker: anybody '
                'could read all topics and give orders; set "enrolled", or take out broker.tls'
            )
        if lacking := self.average.lacking(self.cohort.min_devices):
            raise ValueError(f"average: {lacking}")
        expect("keep_every", self.keep_every, self.keep_every >= 0, "0 (none) or more")
        expect("heldout_limit", self.heldout_limit, self.heldout_limit >= 0, "0 (all) or more")

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
