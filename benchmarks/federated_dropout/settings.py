"""The runs: data sets with the paper's learning rates, and settings of what is trained and sent.

A setting is a keep rate and two codec specs, down (weights) and up (updates). Groups follow the
figures of Caldas et al. 2018: lossy weights down, lossy updates up, keep rates, and all of them
together (`paper`). `beyond` is what came after the paper, `claim` is both.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import runs
from orchestrator.config import CohortConfig, DeviceConfig, RunConfig, ServerConfig, SubmodelConfig
from wire.errors import SettingsError


@dataclass(frozen=True)
class Data:
    """A data set and its training: the paper's learning rate, pixels from 0 to 1."""

    model: str
    classes: int
    input: tuple[int, int, int]
    lr: float


DATA = {
    "mnist": Data("caldas_cnn", 10, (1, 28, 28), 0.15),
    "fashion-mnist": Data("caldas_cnn", 10, (1, 28, 28), 0.15),
    "emnist": Data("caldas_cnn", 62, (1, 28, 28), 0.035),
    "cifar10": Data("allconv", 10, (3, 32, 32), 0.05),
}


@dataclass(frozen=True)
class Setting:
    """What devices train and what is sent; see `RunConfig`."""

    name: str
    keep_rate: float = 1.0
    down: str = "float32"
    up: str = "float32"
    units: str = "random"
    absent: str = "zero"


BASELINE = Setting("fedavg")


TRANSFORMS = ("identity", "hadamard", "kashin")

# Frames of 4,096 coefficients hold 3,481 values: kashin sends 1.18 times its bits.
GROUPS: dict[str, tuple[Setting, ...]] = {
    "baseline": (BASELINE,),
    "down": tuple(
        Setting(f"down {basis}|q={q}", down=f"{basis}|q={q}")
        for q in (4, 2)
        for basis in TRANSFORMS
    ),
    "up": tuple(
        Setting(f"up {basis}|{rest}", up=f"{basis}|{rest}")
        for rest in ("q=2", "q=1", "s=0.25|q=2", "s=0.1|q=2")
        for basis in TRANSFORMS
    ),
    "keep": tuple(Setting(f"keep {rate:g}", rate) for rate in (0.875, 0.75, 0.625, 0.5)),
    "units": (
        Setting("keep 0.75", 0.75),
        Setting("keep 0.75, holders", 0.75, absent="holders"),
        Setting("keep 0.75, shared", 0.75, units="shared"),
        Setting("keep 0.75, ordered", 0.75, units="ordered"),
        Setting("keep 0.75, rolling, holders", 0.75, units="rolling", absent="holders"),
        Setting("keep 0.5, holders", 0.5, absent="holders"),
    ),
    "paper": (
        Setting("paper, hadamard", 0.75, "hadamard|q=4/float16", "hadamard|s=0.95|q=2/float16"),
        Setting("paper, kashin", 0.75, "kashin|q=3/float16", "kashin|s=0.8|q=2/float16"),
    ),
    "beyond": (
        Setting("eden", 0.75, "eden|b=2.5|mse/float16", "eden|b=0.85/float16"),
        Setting(
            "eden, holders", 0.75, "eden|b=2.5|mse/float16", "eden|b=0.85/float16", absent="holders"
        ),
        Setting(
            "eden, keep 0.5, holders",
            0.5,
            "eden|b=3|mse/float16",
            "eden|b=1/float16",
            absent="holders",
        ),
    ),
}
GROUPS["claim"] = GROUPS["paper"] + GROUPS["beyond"]


def find(names: str) -> list[Setting]:
    """The settings of groups or names, separated by `;`, the baseline first.

    Raises:
        SettingsError: a name is unknown; the message lists all.
    """
    every = {setting.name: (setting,) for group in GROUPS.values() for setting in group} | GROUPS
    chosen: dict[Setting, None] = {}
    for name in map(str.strip, names.split(";")):
        if name not in every:
            known = "; ".join([*GROUPS, *(n for n in every if n not in GROUPS)])
            raise SettingsError(f"no setting is named {name!r}; known are: {known}")
        chosen |= dict.fromkeys(every[name])
    return [BASELINE, *(s for s in chosen if s != BASELINE)]


def run_config(
    setting: Setting, *, data: str, seed: int, rounds: int, eval_every: int, folder: Path
) -> RunConfig:
    """The run of a setting: 10 devices a round, one local epoch, batch 10, plain SGD."""
    chosen = DATA[data]
    channels = chosen.input[0]
    device = DeviceConfig(
        model=chosen.model,
        classes=chosen.classes,
        input=chosen.input,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        batch=10,
        epochs=1,
        lr=chosen.lr,
        momentum=0.0,
        weight_decay=0.0,
        update=setting.up,
        state=setting.down,
    )
    whole = setting.keep_rate == 1
    config = RunConfig(
        name=runs.title(data, setting.name, seed),
        heldout=runs.data_folder(folder, data, seed) / "heldout.npz",
        strategy="fedavg" if whole else "feddropout",
        rounds=rounds,
        runs=folder,
        seed=seed,
        cohort=CohortConfig(min_devices=10, max_devices=10),
        device=device,
        server=ServerConfig(eval_every=eval_every, eval_batch=100),
    )
    if whole:
        return config
    return replace(
        config,
        submodel=SubmodelConfig(
            setting.keep_rate,
            units=setting.units,  # type: ignore[arg-type]  # a literal above
            absent=setting.absent,  # type: ignore[arg-type]
        ),
    )
