"""What 20 % hostile devices cost an average of weights, by attack and by rule.

    python -m benchmarks.hostile --data mnist --devices 20 --per-device 200 --rounds 20 --seeds 3

All devices train `network.py` in each round: one epoch, batch 20. The last fifth of them is
hostile, as `attacks.py` says. The printed table has a row for each rule of `[average]` and a column
for each attack: accuracy of the global model on the test set after the last round, in percent; mean
of the seeds, and lowest to highest. "into 0" is the share of test images of other classes that are
taken for class 0 once they show the backdoor's square. A finished run is not done again.

    fedavg      whole models
    feddropout  sub-models of 3/4 of the units, drawn for each device; averaged over holders
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import command, runs
from benchmarks.hostile import attacks
from benchmarks.hostile.attacks import Attack
from benchmarks.runs import Record
from ondevice.images import Preprocess
from orchestrator import strategies
from orchestrator.config import (
    AverageConfig,
    CohortConfig,
    DeviceConfig,
    RunConfig,
    ServerConfig,
    SubmodelConfig,
)
from orchestrator.launch import prepare
from orchestrator.run_folder.store import last_checkpoint
from orchestrator.training import distill
from wire.errors import SettingsError
from wire.names import anchored

INPUT = {"mnist": (1, 28, 28), "digits": (3, 32, 32)}
SHARE = 0.2
HERE = Path(__file__).parent
RULES = {
    "mean": AverageConfig(),
    "clip": AverageConfig(clip=1.0),
    "median": AverageConfig("median"),
    "trimmed_mean": AverageConfig("trimmed_mean", hostile=SHARE),
    "multi_krum": AverageConfig("multi_krum", hostile=SHARE),
}
STRATEGIES = {"fedavg": "Attacked", "feddropout": "AttackedDropout"}


@dataclass(frozen=True)
class Setting:
    """One run: a strategy, a rule, an attack."""

    strategy: str
    rule: str
    attack: Attack

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"{self.strategy}, {self.rule}, {self.attack}"


SETTINGS = {
    setting.name: setting
    for strategy in STRATEGIES
    for rule in RULES
    for attack in get_args(Attack)
    if (setting := Setting(strategy, rule, attack))
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; returns 0, 2 if the input is bad or a run fails, or 3 if rounds are left."""
    parser = command.parser("hostile", __doc__)
    runs.add_options(
        parser,
        data=tuple(INPUT),
        settings="all",
        out="hostile",
        rounds=20,
        devices=20,
        eval_every=5,
    )
    parser.add_argument("--split", choices=("iid", "dirichlet"), default="iid")
    return runs.main(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    if options.one:
        _one(options, **json.loads(options.one))
        return
    chosen = _find(options.settings)
    for seed in range(options.seeds):
        folder = runs.data_folder(options.out, options.data, seed)
        runs.deal(
            folder,
            options.train or options.data,
            devices=options.devices,
            per_device=options.per_device,
            seed=seed,
            split=options.split,
            heldout=options.heldout,
        )
        names = attacks.hostile(options.devices, SHARE)
        for attack in {setting.attack for setting in chosen}:
            attacks.poison(folder, _shards(options, attack, seed), attack, names)
    runs.do(
        options,
        "benchmarks.hostile",
        [setting.name for setting in chosen],
        lambda name, seed: runs.is_done(options.out, options.data, name, seed, options.rounds),
        lambda: _report(options),
    )


def _find(names: str) -> list[Setting]:
    """Settings whose names begin with one of the given ones, separated by `;`."""
    if names == "all":
        return [*SETTINGS.values()]
    found = []
    for name in map(str.strip, names.split(";")):
        some = [setting for setting in SETTINGS.values() if setting.name.startswith(name)]
        if not some:
            raise SettingsError(
                f"no setting is named {name!r}; known are: all; {'; '.join(SETTINGS)}, and what "
                "they begin with"
            )
        found += [setting for setting in some if setting not in found]
    return found


def _shards(options: argparse.Namespace, attack: str, seed: int) -> Path:
    folder = runs.data_folder(options.out, options.data, seed)
    return folder.with_name(f"{folder.name}-{attack.replace(' ', '-')}")


def run_config(options: argparse.Namespace, setting: Setting, seed: int) -> RunConfig:
    """The configuration of a setting's run."""
    shape = INPUT[options.data]
    hostile = {
        "attack": setting.attack,
        "devices": attacks.hostile(options.devices, SHARE),
    }
    return RunConfig(
        name=runs.title(options.data, setting.name, seed),
        heldout=runs.data_folder(options.out, options.data, seed) / "heldout.npz",
        strategy=anchored(f"{HERE / 'attacks.py'}:{STRATEGIES[setting.strategy]}", Path()),
        strategy_settings=hostile,
        rounds=options.rounds,
        runs=options.out,
        seed=seed,
        cohort=CohortConfig(min_devices=options.devices),
        average=RULES[setting.rule],
        submodel=SubmodelConfig(0.75, absent="holders")
        if setting.strategy == "feddropout"
        else SubmodelConfig(),
        device=DeviceConfig(
            model=anchored(f"{HERE / 'network.py'}:small", Path()),
            classes=10,
            input=shape,
            mean=(0.3,) * shape[0],
            std=(0.3,) * shape[0],
            batch=20,
            lr=0.05,
        ),
        server=ServerConfig(eval_every=options.eval_every, eval_batch=500),
    )


def _one(options: argparse.Namespace, name: str, seed: int, seconds: float | None) -> None:
    setting = SETTINGS[name]
    config = run_config(options, setting, seed)
    strategies.check(config)
    runs.simulate(options, config, _shards(options, setting.attack, seed), seconds)
    rounds = json.loads((config.folder / "report.json").read_text())["rounds"]
    record = {
        "setting": {"name": name, **asdict(setting)},
        "seed": seed,
        "rounds": len(rounds),
        "devices": options.devices,
        "per_device": options.per_device,
        "split": options.split,
        "accuracy": {e["round"]: e["server_accuracy"] for e in rounds if "server_accuracy" in e},
        "into_target": into_target(config),
        "seconds": sum(entry["seconds"] for entry in rounds),
    }
    runs.keep(config, options.out, record)


def into_target(config: RunConfig) -> float:
    """The share of held-out images of other classes that the backdoor's square turns into 0."""
    _, state = last_checkpoint(config.folder)
    model = distill.load(prepare.fresh(config), state.under("global"))
    with np.load(str(config.heldout)) as held:
        shown = attacks.triggered(held["x"][held["y"] != attacks.TARGET])
    x = np.empty((len(shown), *config.device.input), np.float32)
    Preprocess(config.device.mean, config.device.std)(shown, out=x)
    logits = distill.predict(model, x, config.server)
    return float((logits.argmax(axis=1) == attacks.TARGET).mean())


def _report(options: argparse.Namespace) -> None:
    records = runs.collect(options.out, options.data)
    if records:
        console = Console()
        console.width = max(console.width, 140)
        for strategy in STRATEGIES:
            console.print(table(strategy, records))


def table(strategy: str, records: Sequence[Record]) -> Table:
    """Accuracy by rule and attack."""
    shown = Table(title=f"{strategy}: accuracy, %", box=None)
    for title in ("rule", *get_args(Attack), "into 0"):
        shown.add_column(title, justify="left" if title == "rule" else "right")
    for rule in RULES:
        cells = []
        for attack in get_args(Attack):
            mine = [
                r for r in records if r["setting"]["name"] == Setting(strategy, rule, attack).name
            ]
            cells.append(runs.spread([100 * runs.last(record) for record in mine]))
        cells.append(runs.spread([100 * record["into_target"] for record in mine]))
        if any(cells):
            shown.add_row(rule, *cells)
    return shown


if __name__ == "__main__":
    sys.exit(main())
