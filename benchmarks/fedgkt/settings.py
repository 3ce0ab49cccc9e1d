"""The runs: data sets, presets, and how each setting differs from the base run.

The base run is FedGKT with logits sent both ways and feature maps sent as `relu|q=4|zstd`. A
setting changes a few keys of `run.toml`. Settings are grouped by what they examine:

    transfer    which way logits go, an ablation of He et al. 2020
    compare     what FedGKT has to beat
    payload     the codec of feature maps
    uplink      how often feature maps travel
    frugal      few bytes: a frozen shared extractor and views together
    devices     how many devices hold the same images
    networks    several device networks in one run
    late        devices that miss a round's end
    pretrained  both halves begin with a whole network that was trained on all images, as those of
                the reference partly did
    full        our best setting, at the paper's size: a fixed extractor whose maps travel once, and
                a fast large network; compared with "best"
    short       the same with ten server epochs, which all come in the second round: what each
                choice is worth; for --rounds 2, compared with "short"
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks import runs
from orchestrator.config import RunConfig
from wire import records
from wire.errors import SettingsError
from wire.names import anchored

FEATURES = "relu|q=4|zstd"


@dataclass(frozen=True)
class Data:
    """A data set: its classes, and mean and deviation of its pixels on the 0..1 scale."""

    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATA = {
    "cifar10": Data(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Data(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cinic10": Data(10, (0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),
    "digits": Data(10, (0.306, 0.306, 0.306), (0.324, 0.324, 0.324)),
}

# A server half, and the whole network that it makes with the extractor of a device half.
WHOLE = {
    "resnet10": "resnet11",
    "resnet19": "resnet20",
    "resnet55": "resnet56",
    "resnet109": "resnet110",
}


@dataclass(frozen=True)
class Plan:
    """What all runs of a folder have in common.

    Attributes:
        data: the data set's name.
        source: the file that it was read from, or the name again.
        split, alpha: how images are dealt out; alpha is None for iid.
        devices: how many devices the base run has.
        per_device: images of each device; None: all images are dealt out.
        heldout_limit: how many images are evaluated on, drawn at random by seed; None: all.
        server_model, server_epochs, precision: of `[server]`.
        epochs, batch, lr: of `[device]`.
        schedule: of both learning rates.
        rounds: when the schedule ends; None for a constant rate, and rounds may then be added.
        eval_every: rounds from one evaluation to the next.
        engine: what trains simulated devices; "agents" if they are real.
    """

    data: str
    source: str
    split: Literal["iid", "dirichlet"]
    alpha: float | None
    devices: int
    per_device: int | None
    heldout_limit: int | None
    server_model: str
    server_epochs: int
    precision: str
    epochs: int
    batch: int
    lr: float
    schedule: Literal["constant", "cosine"]
    rounds: int | None
    eval_every: int
    engine: str = "torch"


def presets(split: str) -> dict[str, dict[str, Any]]:
    """Defaults of the command line by preset; the paper's depend on how images are dealt out."""
    paper = {
        "rounds": 200,
        "devices": 16,
        "server_model": "resnet55",
        "server_epochs": 20 if split == "iid" else 10,
        "precision": "auto",
        "epochs": 1,
        "batch": 32,
        "lr": 0.05,
        "schedule": "cosine",
        "eval_every": 5,
    }
    cpu = {
        "rounds": 10,
        "devices": 10,
        "per_device": 250,
        "heldout_limit": 2000,
        "server_model": "resnet10",
        "server_epochs": 4,
        "precision": "bfloat16",
        "epochs": 3,
        "batch": 16,
        "eval_every": 2,
    }
    full = {
        "rounds": 30,
        "server_model": "fastcnn6-64",
        "server_epochs": 16,
        "precision": "bfloat16",
    }
    return {"paper": paper, "cpu": paper | cpu, "full": paper | full}


PRESETS = tuple(presets("iid"))


@dataclass(frozen=True)
class Setting:
    """How a run differs from the base run.

    Attributes:
        name: the setting's name.
        change: keys of `run.toml` with their values.
        devices: how many devices the images are dealt out to; 0: as many as in the base run.
        whole: whether devices train the whole large network.
        late: share of a round's devices that miss its end.
        start: a setting; the networks begin with those that its run of the same seed ended with.
            Empty: with random weights.
    """

    name: str
    change: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 0
    whole: bool = False
    late: float = 0.0
    start: str = ""


BASE = Setting("two-way")


FRUGAL = {"extractor": "shared", "freeze_after": 1, "views": True}


# Three of ten devices each; the other four have the base run's resnet8.
MIXED = (
    {"model": "resnet4", "devices": "*[0-2]"},
    {"model": "resnet6", "devices": "*[3-5]"},
)


def _frugal(
    name: str, features: str, alpha: float, *, device_alpha: float = 1.0, **transfer: object
) -> Setting:
    device, server = {"features": features, "alpha": device_alpha}, {"alpha": alpha}
    return Setting(name, {"device": device, "server": server, "transfer": FRUGAL | transfer})


# No round has new feature maps, so that the server's epochs might all be in the first. They are
# spread over 16, each of which is a place to go on from after a stop.
BEST = Setting(
    "best",
    {
        "device": {"model": "resnet8-opponent", "features": FEATURES},
        "transfer": {"extractor": "shared", "network": "shared", "freeze_after": 0, "views": True},
        "server": {
            "epochs": (2,) * 16 + (0,), "batch": 1000, "optimizer": "muon", "lr": 0.17,
            "schedule": "linear", "alpha": 0.0, "label_smoothing": 0.2, "averaging": True,
            "flips": "alternating", "shift": 2, "small_crops": 0.64, "eval_batch": 500,
            "eval_views": True,
        },
    },
)  # fmt: skip
RESNET55 = {"model": "resnet55", "epochs": (2,) * 20 + (0,), "batch": 250, "eval_batch": 64}


def _best(name: str, devices: int = 0, **change: Mapping[str, object]) -> Setting:
    return _changed(BEST, name, change, devices)


def _changed(
    setting: Setting, name: str, change: Mapping[str, Mapping[str, object]], devices: int = 0
) -> Setting:
    tables = {key: {**table, **change.get(key, {})} for key, table in setting.change.items()}
    return Setting(name, tables, devices)


# Devices train in both rounds, but are not taught.
SHORT = _best("short", device={"alpha": 0.0}, server={"epochs": (0, 10)})
OWN = Path(__file__).with_name("networks.py")
PIXELS = {"model": anchored(f"{OWN}:Pixels", Path()), "features": "float32", "alpha": 0.0}


def _short(name: str, **change: Mapping[str, object]) -> Setting:
    return _changed(SHORT, f"short, {name}", change)


FEDAVG_RESNET8 = Setting("fedavg resnet8", {"strategy": "fedavg"})
ALONE = Setting("resnet8 alone", {"strategy": "local"})
SHARED = FEDAVG_RESNET8, ALONE  # by groups with different bases


def _uplink(name: str, **transfer: object) -> Setting:
    return Setting(name, {"transfer": transfer} if transfer else {})


GROUPS: dict[str, tuple[Setting, ...]] = {
    "transfer": (
        Setting("none", {"device": {"alpha": 0.0}, "server": {"alpha": 0.0}}),
        Setting("to server", {"device": {"alpha": 0.0}}),
        Setting("to devices", {"server": {"alpha": 0.0}}),
        BASE,
        Setting("two-way, server alpha 0.1", {"server": {"alpha": 0.1}}),
    ),
    "compare": (
        Setting("fedavg large", {"strategy": "fedavg"}, whole=True),
        Setting("centralized", {"strategy": "fedavg"}, whole=True, devices=1),
        ALONE,
        FEDAVG_RESNET8,
    ),
    "payload": tuple(
        Setting(spec, {"device": {"features": spec}} if spec != FEATURES else {})
        for spec in ("float32", *(f"relu|q={q}|zstd" for q in ("8", "4", "3", "2", "1.5", "1")))
    ),
    "uplink": (
        _uplink("every round"),
        _uplink("every round, views", views=True),
        _uplink("shared", extractor="shared"),
        _uplink("on change", resend=0.1),
        _uplink("freeze after 1", freeze_after=1),
        _uplink("freeze after 3", freeze_after=3),
        _uplink("shared, freeze after 3", extractor="shared", freeze_after=3),
        _uplink("shared, freeze after 1, views", extractor="shared", freeze_after=1, views=True),
        _uplink("shared, freeze after 3, views", extractor="shared", freeze_after=3, views=True),
        _uplink("frozen from the start, views", freeze_after=0, views=True),
    ),
    "frugal": (
        _frugal("frugal, q=2", "relu|q=2|zstd", 0.1),
        _frugal("frugal, to devices", "relu|q=2|zstd", 0.0),
        _frugal("frugal, to server", "relu|q=2|zstd", 0.1, device_alpha=0.0),
        _frugal("frugal, none", "relu|q=2|zstd", 0.0, device_alpha=0.0),
        _frugal("frugal, float32", "float32", 0.1),
        _frugal("frugal, q=4", "relu|q=4|zstd", 0.1),
        _frugal("frugal, q=3", "relu|q=3|zstd", 0.1),
        _frugal("frugal, q=1", "relu|q=1|zstd", 0.1),
        _frugal("frugal, shared", "relu|q=2|zstd", 0.0, network="shared"),
        _frugal(
            "frugal, shared, plain students",
            "relu|q=2|zstd",
            0.0,
            network="shared",
            student_views=False,
        ),
        _frugal("frugal, shared, none", "relu|q=2|zstd", 0.0, device_alpha=0.0, network="shared"),
        _frugal(
            "frugal, shared, frozen after 3", "relu|q=2|zstd", 0.0, network="shared", freeze_after=3
        ),
    ),
    "devices": tuple(Setting(f"{n} devices", devices=n) for n in (8, 16, 64, 128)),
    "networks": (
        Setting("resnet4, 6 and 8", {"device": {"others": MIXED}}),
        Setting(
            "frugal, resnet4, 6 and 8",
            {
                "device": {"features": "relu|q=2|zstd", "others": MIXED},
                "server": {"alpha": 0.0},
                "transfer": FRUGAL,
            },
        ),
    ),
    "late": (
        Setting("30 % late", {"cohort": {"carry_rounds": 1}}, late=0.3),
        Setting("30 % lost", late=0.3),
        Setting(
            "30 % late, aged",
            {"cohort": {"carry_rounds": 1}, "transfer": {"age_decay": 0.5}},
            late=0.3,
        ),
    ),
    "pretrained": (Setting("from centralized", start="centralized"),),
    "full": (
        BEST,
        _best("best, q=3", device={"features": "relu|q=3|zstd"}),
        _best("best, q=2", device={"features": "relu|q=2|zstd"}),
        _best("best, resnet55", server=RESNET55),
        _best("best, none", device={"alpha": 0.0}, server={"epochs": (1, 0)}),
        _best("best, to server", device={"alpha": 0.0}, server={"alpha": 1.0}),
        _best("best, two-way", server={"alpha": 1.0}),
        _best("best, plain students", transfer={"student_views": False}),
        *(_best(f"best, {n} devices", devices=n) for n in (8, 64)),
        _best("all images", devices=1, device=PIXELS),
        Setting("published rule", {"server": {"model": "resnet55", "epochs": 1}}),
        Setting("fedavg resnet20", {"strategy": "fedavg", "device": {"model": "resnet20"}}),
        FEDAVG_RESNET8,
        ALONE,
    ),
    "short": (
        SHORT,
        *(_short(f"q={q}", device={"features": f"relu|q={q}|zstd"}) for q in (3, 2)),
        _short("float32", device={"features": "float32"}),
        *(
            _short(f"{n} channels", device={"model": anchored(f"{OWN}:opponent{n}", Path())})
            for n in (24, 32)
        ),
        _short("random extractor", device={"model": "resnet8"}),
        _short("trained extractor", device={"model": "resnet8"}, transfer={"freeze_after": 1}),
        _short("pixels", device=PIXELS),
        _short("no small crops", server={"small_crops": 0.0}),
        _short("no averaging", server={"averaging": False}),
        _short("no label smoothing", server={"label_smoothing": 0.0}),
        _short("random flips", server={"flips": "random"}),
        _short("shift 4", server={"shift": 4}),
        _short("sgd", server={"optimizer": "sgd", "lr": 0.3}),
        _short("adam", server={"optimizer": "adam", "lr": 0.003}),
    ),
}
# Settings of these groups are compared with the group's first one.
OWN_BASE = "full", "short"
ORDER = tuple(dict.fromkeys([BASE.name, *(s.name for group in GROUPS.values() for s in group)]))


def group(name: str, devices: int) -> list[Setting]:
    """The settings of a group. A setting that changes nothing becomes the base run.

    Args:
        name: the group's name.
        devices: how many devices the base run has.
    """
    return [_resolve(setting, devices) for setting in GROUPS[name]]


def _resolve(setting: Setting, devices: int) -> Setting:
    own = setting.devices if setting.devices != devices else 0
    return BASE if replace(setting, name=BASE.name, devices=own) == BASE else setting


def base(names: Container[str]) -> str:
    """The setting that others are compared with; see the module's docstring."""
    for group in OWN_BASE:
        if any(setting.name in names and setting not in SHARED for setting in GROUPS[group]):
            return base_of(group)
    return BASE.name


def base_of(group: str) -> str:
    """The setting that those of a group are compared with."""
    return GROUPS[group][0].name if group in OWN_BASE else BASE.name


def find(names: str, devices: int) -> list[Setting]:
    """The settings of groups or names, separated by `;`, the base run first.

    Args:
        names: as on the command line.
        devices: how many devices the base run has.

    Raises:
        SettingsError: no group or setting has the name; the message lists all names.
    """
    every = {setting.name: (setting,) for group in GROUPS.values() for setting in group} | GROUPS
    found: dict[str, Setting] = {}
    for name in map(str.strip, names.split(";")):
        if name not in every:
            known = "; ".join([*GROUPS, *(n for n in every if n not in GROUPS)])
            raise SettingsError(f"no setting is named {name!r}; known are: {known}")
        for setting in every[name]:
            own = _resolve(setting, devices)
            if own.start:  # the setting to begin with comes first
                found |= {each.name: each for each in every[own.start]}
            found[own.name] = own
    first = every[base(found)][0]
    return list(({first.name: first} | found).values())


def run_config(setting: Setting, plan: Plan, *, seed: int, rounds: int, folder: Path) -> RunConfig:
    """The configuration of a setting's run. Every device takes part in every round.

    Raises:
        SettingsError: `run.toml` has no such key, or the run to begin with is not done.
    """
    chosen = DATA[plan.data]
    table: dict[str, Any] = {
        "name": runs.title(plan.data, setting.name, seed),
        "heldout": str(data_folder(setting, plan, seed, folder) / "heldout.npz"),
        "strategy": "fedgkt",
        "rounds": rounds,
        "runs": str(folder),
        "seed": seed,
        "cohort": {"min_devices": setting.devices or plan.devices},
        "device": {
            "model": device_model(setting, plan),
            "classes": chosen.classes,
            "input": (3, 32, 32),
            "mean": chosen.mean,
            "std": chosen.std,
            "batch": plan.batch,
            "epochs": plan.epochs,
            "lr": plan.lr,
            "schedule": plan.schedule,
            "features": FEATURES,
        },
        "server": {
            "model": anchored(plan.server_model, Path()),
            "epochs": plan.server_epochs,
            "precision": plan.precision,
            "schedule": plan.schedule,
            "eval_every": plan.eval_every,
        },
    }
    if setting.start:
        if not runs.is_done(folder, plan.data, setting.start, seed, rounds):
            raise SettingsError(
                f"{setting.name!r} begins with what {setting.start!r} ended with; run that first"
            )
        table["pretrained"] = str(folder / runs.title(plan.data, setting.start, seed))
    for key, value in setting.change.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, Mapping) else value
    return records.build(RunConfig, table, where=f"setting {setting.name!r}", error=SettingsError)


def device_model(setting: Setting, plan: Plan) -> str:
    """What devices train: a small network, or the whole that the server's network is the rest of.

    Raises:
        SettingsError: nobody knows which whole that is.
    """
    if not setting.whole:
        return "resnet8"
    if plan.server_model not in WHOLE:
        raise SettingsError(
            f"setting {setting.name!r} trains the whole network, which is known for the server's "
            f"{', '.join(WHOLE)}, not for {plan.server_model}; leave it out of --settings"
        )
    return WHOLE[plan.server_model]


def data_folder(setting: Setting, plan: Plan, seed: int, folder: Path) -> Path:
    """The folder of a seed's shards; a setting with another number of devices has its own."""
    base = runs.data_folder(folder, plan.data, seed)
    devices = setting.devices or plan.devices
    return base if devices == plan.devices else base.with_name(f"{base.name}-{devices}")
