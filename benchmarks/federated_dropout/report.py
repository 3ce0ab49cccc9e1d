"""What became of the runs: a file for each, the table of factors, and the curves."""

import json
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import models
from benchmarks.federated_dropout.settings import BASELINE, GROUPS, Setting, slug
from orchestrator.config import RunConfig

Record = dict[str, Any]
DASHES = ("-", "--", ":")


def keep(config: RunConfig, setting: Setting, folder: Path) -> None:
    """Write a finished run's record: accuracy, bytes and FLOPs."""
    device = config.device
    model = models.build(device.model, classes=device.classes, input_shape=device.input)
    whole = 4 * sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    rounds = json.loads((config.folder / "report.json").read_text())["rounds"]
    joined = [d for entry in rounds for d in entry["devices"].values() if d["accepted"]]
    record = {
        "setting": asdict(setting),
        "seed": config.seed,
        "rounds": len(rounds),
        "refused": sum(len(entry["cohort"]) for entry in rounds) - len(joined),
        "accuracy": {e["round"]: e["server_accuracy"] for e in rounds if "server_accuracy" in e},
        "float32_bytes": whole,
        "bytes_down": statistics.fmean(d["bytes_down"] for d in joined),
        "bytes_up": statistics.fmean(d["bytes_up"] for d in joined),
        "train_flops": statistics.fmean(d["train_flops"] for d in joined),
        "seconds": sum(entry["seconds"] for entry in rounds),
    }
    (folder / f"{config.name}.json").write_text(json.dumps(record, indent=1) + "\n")


def is_done(folder: Path, data: str, setting: Setting, seed: int, rounds: int) -> bool:
    """Whether a run's record is there, of as many rounds."""
    path = folder / f"{data}-{slug(setting.name)}-{seed}.json"
    return path.exists() and json.loads(path.read_text())["rounds"] >= rounds


def write(folder: Path, data: str) -> None:
    """All records of a data set as one file, the table on the terminal, and the pictures."""
    records: list[Record] = [
        json.loads(path.read_text()) for path in sorted(folder.glob(f"{data}-*-[0-9]*.json"))
    ]
    if not records:
        return
    (folder / f"{data}.json").write_text(json.dumps(records, indent=1) + "\n")
    console = Console()
    console.width = max(console.width, 140)
    console.print(table(data, records))
    longest = max(record["rounds"] for record in records)
    if short := [record for record in records if record["rounds"] < longest]:
        names = ", ".join(f"{r['setting']['name']} (seed {r['seed']})" for r in short)
        console.print(f"left out, with fewer than {longest} rounds: {names}")
    for group in GROUPS:
        draw(folder / f"{data}-{group}.png", data, group, records)


def table(data: str, records: list[Record]) -> Table:
    """One row a setting; factors are against float32 and the whole model.

    "to FedAvg" is in points of accuracy, of runs with the same seed: mean (lowest, highest).
    """
    shown = Table(title=f"{data}: {max(r['rounds'] for r in records)} rounds", box=None)
    for title in ("setting", "keep", "down", "up", "download", "upload", "compute", "accuracy",
                  "lowest", "highest", "to FedAvg", "seeds"):  # fmt: skip
        left = title in ("setting", "down", "up")
        shown.add_column(title, justify="left" if left else "right")
    runs = by_setting(records)
    base = runs.get(BASELINE.name, [])
    for name, mine in runs.items():
        final = [last(record) for record in mine]
        first = mine[0]
        flops = base[0]["train_flops"] / first["train_flops"] if base else float("nan")
        gaps = [100 * (last(r) - last(b)) for r in mine for b in base if r["seed"] == b["seed"]]
        shown.add_row(
            name,
            f"{first['setting']['keep_rate']:g}",
            first["setting"]["down"],
            first["setting"]["up"],
            f"{factor(mine, 'bytes_down'):.1f}x",
            f"{factor(mine, 'bytes_up'):.1f}x",
            f"{flops:.2f}x",
            f"{100 * statistics.fmean(final):.2f}",
            f"{100 * min(final):.2f}",
            f"{100 * max(final):.2f}",
            f"{statistics.fmean(gaps):+.2f} ({min(gaps):+.2f}, {max(gaps):+.2f})" if gaps else "",
            str(len(mine)),
        )
    return shown


def by_setting(records: list[Record]) -> dict[str, list[Record]]:
    """Records of the most rounds by setting, in the order of the settings."""
    rounds = max(record["rounds"] for record in records)
    grouped = defaultdict(list)
    for record in records:
        if record["rounds"] == rounds:
            grouped[record["setting"]["name"]].append(record)
    order = [setting.name for group in GROUPS.values() for setting in group]
    return {name: grouped[name] for name in order if name in grouped}


def factor(records: list[Record], key: str) -> float:
    """How many times fewer bytes than float32 of the whole model."""
    return float(records[0]["float32_bytes"] / statistics.fmean(r[key] for r in records))


def last(record: Record) -> float:
    """Accuracy after the last round."""
    return float(record["accuracy"][str(record["rounds"])])


def draw(path: Path, data: str, group: str, records: list[Record]) -> None:
    """Accuracy over rounds of a group's settings and the baseline; bands are lowest to highest."""
    from matplotlib.figure import Figure

    names = {setting.name for setting in (BASELINE, *GROUPS[group])}
    runs = {name: mine for name, mine in by_setting(records).items() if name in names}
    if len(runs) < 2:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lowest = 1.0
    for number, (name, mine) in enumerate(runs.items()):
        # A run that was made longer was evaluated at its former end as well.
        rounds = sorted(set.intersection(*({int(r) for r in m["accuracy"]} for m in mine)))
        curves = [[100 * record["accuracy"][str(r)] for r in rounds] for record in mine]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        dash = DASHES[number // 11 % len(DASHES)]  # a colour comes back after ten, and the baseline
        style = {"color": "black", "linewidth": 2} if name == BASELINE.name else {"linestyle": dash}
        (line,) = axes.plot(rounds, mean, label=name, **style)
        if len(mine) > 1:
            low, high = zip(*((min(v), max(v)) for v in zip(*curves, strict=True)), strict=True)
            axes.fill_between(rounds, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        lowest = min(lowest, *(v / 100 for v in mean[len(mean) // 4 :]))
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy on the test set, %")
    axes.set_ylim(max(0.0, 100 * lowest - 2), None)
    axes.set_title(f"{data}: {group}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
