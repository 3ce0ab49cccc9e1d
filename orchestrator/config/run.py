"""A whole run."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

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
    """One run.

    Attributes:
        name: of the run, and of its folder under `runs`.
        fleet: whose devices may take part.
        strategy: the algorithm.
        rounds: how many.
        heldout: images that the server evaluates on (.npz or folder). None: feature maps and logits
            of images that devices hold out (`device.holdout`; fedgkt).
        heldout_limit: use at most so many of them, evenly spread; 0 takes all.
        pretrained: the folder of a run whose global model (fedavg, feddropout) all models begin
            with, as far as they have the same layers (`models.inherit`). None: random weights.
        runs: folder of all runs.
        admission: "open" takes any device that the broker lets in; "enrolled" only those made by
            `orchestrator enroll`.
        seed: of initial weights, shuffling, augmentation and stochastic rounding.
        chunk_bytes: size of the pieces that devices pull.
        transfer_chunks: chunks on their way up at once, all devices together.
        retry_s: a chunk that has not come up after so long is asked for again.
        max_upload_bytes: a payload above this is refused.
    """

    name: str
    heldout: Path | None = None
    fleet: str = "fleet"
    strategy: Literal["fedgkt", "fedavg", "feddropout", "local"] = "fedgkt"
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
        self._check_heldout()
        self._check_strategy()

    def _check_heldout(self) -> None:
        device = self.device
        if self.heldout is None and (
            self.strategy != "fedgkt" or not device.holdout or self.transfer.resend
        ):
            raise ValueError(
                "heldout: name images that the server evaluates on; only fedgkt does without, with "
                "device.holdout over 0 and transfer.resend = 0"
            )
        if device.holdout and self.strategy != "fedgkt":
            raise ValueError(
                f"device.holdout: strategy {self.strategy!r} evaluates on the server's images; "
                "leave it out"
            )

    def _check_strategy(self) -> None:
        """Settings that the strategy would ignore are refused."""
        device = self.device
        if self.submodel != SubmodelConfig() and self.strategy != "feddropout":
            raise ValueError(f"submodel: strategy {self.strategy!r} trains whole models; "
                             "use feddropout")  # fmt: skip
        if device.clip and self.transfer.views and self.transfer.freeze_after is not None:
            raise ValueError(
                "device.clip: a crop of a clipped feature map is not that of the crop; leave out "
                "clip and noise, or transfer.views or freeze_after"
            )
        if self.transfer != TransferConfig() and self.strategy != "fedgkt":
            raise ValueError(f"transfer: strategy {self.strategy!r} sends no feature maps; "
                             "use fedgkt")  # fmt: skip
        if (device.others or self.cohort.carry_rounds) and self.strategy not in ("fedgkt", "local"):
            raise ValueError(
                f"device.others and cohort.carry_rounds are for fedgkt and local, not for "
                f"{self.strategy}, which averages weights; leave them out"
            )
        split = [device.split, *(other.split for other in device.others)]
        if any(split) and self.strategy not in ("fedgkt", "local"):
            raise ValueError(
                f"device.split: strategy {self.strategy!r} sends no feature maps; leave it out"
            )
        if (device.mu or device.feedback) and self.strategy not in ("fedavg", "feddropout"):
            raise ValueError(
                f"device.mu and device.feedback are for fedavg and feddropout, not for "
                f"{self.strategy}; leave them out"
            )
        if device.feedback and self.submodel.units != "ordered" and not self.submodel.whole:
            raise ValueError(
                "device.feedback: what a codec left out belongs to the same units in every round; "
                'use submodel.units = "ordered", or whole models'
            )

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """What devices train, each once."""
        device = self.device
        made = [Recipe(device.network, rate) for rate in sorted(self.submodel.rates)]
        made += [Recipe(name) for name in device.models[1:]]
        if self.transfer.freeze_after is not None:
            made += [Recipe(name, frozen=True) for name in device.models]
        return tuple(dict.fromkeys(made))

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        return self.runs / self.name


def load(path: Path) -> RunConfig:
    """Read `run.toml`; relative paths are relative to the folder it lies in, networks' too.

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
    return replace(
        config,
        broker=broker,
        device=replace(device, model=anchored(device.model, folder), others=others),
        server=replace(server, model=anchored(server.model, folder)),
        release=replace(config.release, packages=packages),
        heldout=config.heldout and folder / config.heldout,
        pretrained=config.pretrained and folder / config.pretrained,
        runs=folder / config.runs,
    )
