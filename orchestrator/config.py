"""A run's configuration: `run.toml` as frozen dataclasses."""

import fnmatch
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from wire import codecs, records, tensors, topics
from wire.address import BrokerAddress
from wire.messages import check_noise


@dataclass(frozen=True)
class BrokerConfig:
    """Where the broker is.

    Attributes:
        kind: "embedded" (pure Python, loopback only), "mosquitto" (the orchestrator runs Debian's
            mosquitto itself) or "external" (`url` says where).
        host, port: that our own broker listens on.
        url: mqtt:// or mqtts:// of an external broker.
        username, password: the orchestrator's, at an external broker.
        ca_file, cert_file, key_file: PEM files, for mqtts.
    """

    kind: Literal["embedded", "mosquitto", "external"] = "embedded"
    host: str = "127.0.0.1"
    port: int = 1883
    url: str = ""
    username: str = ""
    password: str = ""
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __post_init__(self) -> None:
        if (self.kind == "external") != bool(self.url):
            raise ValueError(
                f"kind {self.kind!r} with url {self.url!r}: an external broker, and only that, "
                "has a url"
            )
        if self.url:
            self.address()

    def address(self) -> BrokerAddress:
        """Of an external broker.

        Raises:
            ValueError: the url or a file is wrong.
        """
        files = (self.ca_file, self.cert_file, self.key_file)
        return BrokerAddress(self.url, self.username, self.password, *files)


@dataclass(frozen=True)
class CohortConfig:
    """Who takes part in a round, and when it ends.

    Attributes:
        min_devices: a round begins only with so many.
        max_devices: at most so many are chosen; 0 takes all. Over-select with `quorum` below 1.
        wait_s: once `min_devices` are there, wait so long for more, unless `max_devices` are there.
        quorum: the round closes when this share of the cohort has returned.
        deadline_s: the round closes then with whoever has returned.
        carry_rounds: an order that is not answered when its round closes stays open for so many
            more, and its result counts in the round that it arrives in (fedgkt, local); until
            then the device is given no other. 0: late results are refused.
        max_weight: a device counts in an average of weights at most so many times as much as the
            median one: nobody can check how many samples it says to have.
    """

    min_devices: int = 2
    max_devices: int = 0
    wait_s: float = 10.0
    quorum: float = 1.0
    deadline_s: float = 600.0
    carry_rounds: int = 0
    max_weight: float = 10.0

    def __post_init__(self) -> None:
        if self.carry_rounds < 0:
            raise ValueError(f"carry_rounds: expected 0 or more, got {self.carry_rounds}")
        if not 1 <= self.max_weight < math.inf:
            raise ValueError(f"max_weight: expected 1 or more, got {self.max_weight}")
        if self.min_devices < 1 or (self.max_devices and self.max_devices < self.min_devices):
            raise ValueError(
                f"min_devices {self.min_devices}, max_devices {self.max_devices}: expected "
                "1 <= min_devices <= max_devices, or max_devices = 0"
            )
        if not 0 < self.quorum <= 1 or self.deadline_s <= 0 or self.wait_s < 0:
            raise ValueError("expected 0 < quorum <= 1, deadline_s > 0, wait_s >= 0")


@dataclass(frozen=True)
class Other:
    """Devices that train another model than the rest.

    Attributes:
        model: a registry name.
        devices: a pattern of names, `zero-*`.
    """

    model: str
    devices: str


class Recipe(NamedTuple):
    """What a training artifact is made of, besides what all devices share.

    `frozen`: the extractor stays as it is, batch norm's statistics included.
    """

    model: str
    keep_rate: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class DeviceConfig:
    """What each device trains, and how its payloads are coded.

    Attributes:
        model: a registry name.
        others: devices with another model, the first that holds a device decides (fedgkt, local);
            their feature maps must have the same shape.
        classes, input: number of classes; channels, height, width.
        mean, std: of the pixels on the 0..1 scale, per channel.
        batch, epochs, lr, optimizer, momentum, weight_decay: of local training.
        alpha, temperature: of the distillation term (FedGKT).
        mu: weight of the proximal term (FedProx); 0 compiles none.
        augment: random crop with padding 4 and horizontal flip.
        holdout: share of each device's images, drawn by their digest, that it does not train on;
            it reports its accuracy on them, and the server evaluates on them where it has no images
            of its own (fedgkt).
        clip, noise: feature maps are scaled to an L2 norm of at most `clip`, and get Gaussian noise
            of deviation noise * clip; 0: not. That is local differential privacy of each map sent,
            and of nothing else: logits, labels and the device's weights travel as they are.
        features: codec spec of feature maps.
        update, state: of weights on their way up and down, MATRICES[/VECTORS]: `eden|b=2/float16`.
        feedback: each device adds to its update what the codec left out of the last one.
    """

    model: str = "resnet8"
    classes: int = 10
    input: tuple[int, int, int] = (3, 32, 32)
    mean: tuple[float, ...] = (0.4914, 0.4822, 0.4465)
    std: tuple[float, ...] = (0.2470, 0.2435, 0.2616)
    batch: int = 32
    epochs: int = 1
    lr: float = 0.05
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    alpha: float = 1.0
    temperature: float = 3.0
    mu: float = 0.0
    augment: bool = False
    holdout: float = 0.0
    clip: float = 0.0
    noise: float = 0.0
    features: str = "identity|q=8"
    update: str = "float32"
    state: str = "float32"
    feedback: bool = False
    others: tuple[Other, ...] = ()

    def model_of(self, device: str) -> str:
        """The registry name of a device's model."""
        fits = (other.model for other in self.others if fnmatch.fnmatchcase(device, other.devices))
        return next(fits, self.model)

    @property
    def models(self) -> tuple[str, ...]:
        """Every model that a device may train, `model` first."""
        return tuple(dict.fromkeys([self.model, *(other.model for other in self.others)]))

    def __post_init__(self) -> None:
        codecs.parse(self.features)
        tensors.policy(self.state)
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"mu: expected 0 (no proximal term) or more, got {self.mu}")
        sent = tensors.policy(self.update)
        for codec in (sent.matrices, sent.vectors) if self.feedback else ():
            if not (codec.spec.startswith("float") or "mse" in codec.spec.split("|")):
                raise ValueError(
                    f"feedback: {codec.spec} may leave out more than it was given, and what is "
                    "owed then grows without bound; use a codec of least error, eden|b=1|mse"
                )
        if not len(self.mean) == len(self.std) == self.input[0]:
            raise ValueError(
                f"input {list(self.input)}: expected [channels, height, width], with a mean "
                f"({len(self.mean)}) and a std ({len(self.std)}) a channel"
            )
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout: expected a share from 0 to below 1, got {self.holdout}")
        check_noise(self.clip, self.noise)
        if self.classes < 2 or self.batch < 1 or self.epochs < 1 or self.lr <= 0:
            raise ValueError("expected classes >= 2, batch >= 1, epochs >= 1, lr > 0")


@dataclass(frozen=True)
class Tier:
    """Devices that train at one keep rate.

    Attributes:
        keep_rate: over 0 to 1.
        devices: a pattern of names, `zero-*`.
        memory_mb: devices with at most so much memory; 0 asks for none.
    """

    keep_rate: float
    devices: str = "*"
    memory_mb: int = 0

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)
        if self.memory_mb < 0 or (self.devices == "*" and not self.memory_mb):
            raise ValueError(
                "expected a pattern of names in `devices`, or `memory_mb` over 0: a tier of all "
                "devices is `submodel.keep_rate`"
            )

    def holds(self, device: str, memory_bytes: int) -> bool:
        """Whether a device is of this tier."""
        small = not self.memory_mb or memory_bytes <= self.memory_mb * 10**6
        return small and fnmatch.fnmatchcase(device, self.devices)


@dataclass(frozen=True)
class SubmodelConfig:
    """What sub-models devices train (Federated Dropout).

    Attributes:
        keep_rate: p, the share of the units of each hidden layer that a device of no tier trains.
        units: which ones. "random": drawn for each device and round; "shared": drawn for each
            round; "ordered": the first, always (FjORD, HeteroFL); "rolling": a window that moves
            with the rounds (FedRolex).
        absent: what an absent unit counts in the average. "zero": an update of zero (the paper);
            "holders": nothing, the average is of those who have it.
        tiers: the first that holds a device decides.
    """

    keep_rate: float = 1.0
    units: Literal["random", "shared", "ordered", "rolling"] = "random"
    absent: Literal["zero", "holders"] = "zero"
    tiers: tuple[Tier, ...] = ()

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)

    def rate_of(self, device: str, memory_bytes: int) -> float:
        """The keep rate of a device."""
        fits = (tier.keep_rate for tier in self.tiers if tier.holds(device, memory_bytes))
        return next(fits, self.keep_rate)

    @property
    def rates(self) -> frozenset[float]:
        """All keep rates that a device may be given."""
        return frozenset({self.keep_rate, *(tier.keep_rate for tier in self.tiers)})

    @property
    def whole(self) -> bool:
        """Whether every device trains the whole model."""
        return self.rates == {1}


def check_keep_rate(rate: float) -> None:
    """Raise ValueError unless 0 < rate <= 1."""
    if not 0 < rate <= 1:
        raise ValueError(f"keep_rate: expected over 0 to 1 (the whole model), got {rate}")


@dataclass(frozen=True)
class TransferConfig:
    """What travels in FedGKT, and how often.

    Attributes:
        extractor: "own": each device trains its own (the paper); "shared": after each round all
            devices go on with the mean of theirs.
        freeze_after: the extractor is trained in so many rounds, then no more: feature maps travel
            once, and from then on logits alone. None: always trained (the paper).
        views: each round shows each sample in another crop, and mirrored or not, and teacher
            logits are those of the same view. Once the extractor is frozen, feature maps of the
            plain and the mirrored image travel, and the server crops them by itself.
        resend: feature maps travel again only where those of held-out images have changed by more
            than this share (squared error) since; 0: in every round.
        age_decay: a sample's weight in server training for each round since its feature maps or
            logits were made.
        logits: codec spec of logits, those that come without feature maps and those that go back.
    """

    extractor: Literal["own", "shared"] = "own"
    freeze_after: int | None = None
    views: bool = False
    resend: float = 0.0
    age_decay: float = 1.0
    logits: str = "float16"

    def __post_init__(self) -> None:
        if codecs.parse(self.logits).coder.lowest >= 0:
            raise ValueError(
                f"logits: {self.logits} takes no negative values; use float16, identity|q=8, ..."
            )
        if self.freeze_after is not None and self.freeze_after < 0:
            raise ValueError(f"freeze_after: expected 0 rounds or more, got {self.freeze_after}")
        if not 0 <= self.resend < 1 or not 0 < self.age_decay <= 1:
            raise ValueError(
                f"resend {self.resend}, age_decay {self.age_decay}: expected 0 <= resend < 1, "
                "0 < age_decay <= 1"
            )
        if self.resend and self.views:
            raise ValueError("resend: with views every round shows other feature maps; leave one")

    def frozen(self, round_: int) -> bool:
        """Whether the extractor stays as it is in this round."""
        return self.freeze_after is not None and round_ > self.freeze_after


@dataclass(frozen=True)
class ServerConfig:
    """How the server trains its large model (FedGKT), and evaluates.

    Attributes:
        model: a registry name; takes the devices' feature maps.
        epochs, batch, lr, optimizer, weight_decay: of server training in each round.
        schedule: of the learning rate. "constant"; "cosine", from lr to 0 over all rounds and their
            epochs; "plateau", a tenth whenever held-out accuracy has not risen for `patience`
            rounds (the reference code).
        alpha, temperature: of the distillation term.
        torch_device: "auto" takes CUDA where there is one.
        precision: of convolutions and matrix products; "auto" is bfloat16 on CUDA, else float32.
        compile: let torch.compile make the large model; wants a C++ compiler, and on CUDA Triton.
        eval_batch: images of one evaluation pass; on a CPU more than 64 are slower.
        eval_every: weights are evaluated after each so many rounds, and after the last.
    """

    model: str = "resnet19"
    epochs: int = 5
    batch: int = 64
    lr: float = 1e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine", "plateau"] = "constant"
    patience: int = 5
    alpha: float = 1.0
    temperature: float = 3.0
    torch_device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    eval_batch: int = 64
    eval_every: int = 1

    def __post_init__(self) -> None:
        if self.eval_batch < 1 or self.eval_every < 1 or self.patience < 0:
            raise ValueError("expected eval_batch >= 1, eval_every >= 1, patience >= 0")
        if self.epochs < 1 or self.batch < 2 or self.lr <= 0 or self.temperature <= 0:
            raise ValueError("expected epochs >= 1, batch >= 2, lr > 0, temperature > 0")


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
        heldout_limit: use at most so many of them; 0 takes all.
        runs: folder of all runs.
        admission: "open" takes any device that the broker lets in; "enrolled" only those made by
            `orchestrator enroll`.
        seed: of initial weights, shuffling, augmentation and stochastic rounding.
        chunk_bytes: size of the pieces that devices pull.
        transfer_chunks: chunks on their way up at once, all devices together.
        max_upload_bytes: a payload above this is refused.
    """

    name: str
    heldout: Path | None = None
    fleet: str = "fleet"
    strategy: Literal["fedgkt", "fedavg", "feddropout", "local"] = "fedgkt"
    rounds: int = 10
    heldout_limit: int = 0
    runs: Path = Path("runs")
    admission: Literal["open", "enrolled"] = "enrolled"
    seed: int = 0
    chunk_bytes: int = 128 * 1024
    transfer_chunks: int = 32
    max_upload_bytes: int = 1 << 34
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    submodel: SubmodelConfig = field(default_factory=SubmodelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

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
        if self.submodel != SubmodelConfig() and self.strategy != "feddropout":
            raise ValueError(f"submodel: strategy {self.strategy!r} trains whole models; "
                             "use feddropout")  # fmt: skip
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
        made = [Recipe(device.model, rate) for rate in sorted(self.submodel.rates)]
        made += [Recipe(name) for name in device.models[1:]]
        if self.transfer.freeze_after is not None:
            made += [Recipe(name, frozen=True) for name in device.models]
        return tuple(dict.fromkeys(made))

    @property
    def folder(self) -> Path:
        """Where everything of this run lies."""
        return self.runs / self.name


def load(path: Path) -> RunConfig:
    """Read `run.toml`; relative paths are relative to the folder it lies in.

    Raises:
        SettingsError: the message names the file, the key and what was expected.
    """
    config = records.load(RunConfig, path)
    folder = path.resolve().parent
    heldout = config.heldout and folder / config.heldout
    return replace(config, heldout=heldout, runs=folder / config.runs)


TEMPLATE = """\
# A Stillhouse run. Start it with: orchestrator start --config run.toml

name = "first"              # its folder is runs/first
fleet = "fleet"
strategy = "fedgkt"         # fedgkt, feddropout, fedavg or local
rounds = 10
heldout = "heldout.npz"     # images that the server evaluates on: .npz, or a folder of classes
admission = "enrolled"      # or "open": any device that the broker lets in

[broker]
kind = "embedded"           # loopback only; "mosquitto" runs Debian's, "external" takes a url
host = "127.0.0.1"
port = 1883
# url = "mqtts://broker.example:8883"   # with kind = "external"

[cohort]
min_devices = 2             # a round begins only with so many,
wait_s = 10.0               # and waits so long for more
quorum = 1.0                # it closes when this share of the cohort has returned,
deadline_s = 600.0          # or then, with whoever has

[device]
model = "resnet8"
classes = 10
input = [3, 32, 32]
batch = 32
epochs = 1
lr = 0.05
augment = true
features = "identity|q=8"   # codec of the feature maps: float32, identity|q=N, relu|q=4|zstd
update = "float32"          # of weight updates, and of weights on their way down
state = "float32"           # (feddropout, fedavg): "hadamard|q=4", "eden|b=2/float16", ...

# [transfer]                # fedgkt: feature maps travel twice, and then logits alone
# extractor = "shared"      # of all devices, its mean,
# freeze_after = 1          # trained in one round,
# views = true              # and its feature maps cropped by the server: docs/fedgkt.md

[server]
model = "resnet55"          # resnet109, resnet55; resnet19 and resnet10 where there is no GPU
epochs = 5
batch = 64
lr = 0.001
"""
