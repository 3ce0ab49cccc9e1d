"""The results of the runs: a record for each, a table of factors, and curves."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import models
from benchmarks import runs
from benchmarks.federated_dropout.settings import BASELINE, GROUPS, Setting
from benchmarks.runs import Record
from orchestrator.config import RunConfig

ORDER = tuple(setting.name for group in GROUPS.values() for setting in group)


def keep(config: RunConfig, setting: Setting, folder: Path) -> None:
    """Write a finished run's record: accuracy, bytes and FLOPs."""
    device = config.device
    model = models.build(device.network, classes=device.class_count, input_shape=device.input)
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
    runs.keep(config, folder, record)


def write(folder: Path, data: str) -> None:
    """Write all records of a data set to one file, print the table, and draw the pictures."""
    records = runs.collect(folder, data)
    if not records:
        return
    console = Console()
    console.width = max(console.width, 140)
    console.print(table(data, records))
    if short := runs.left_out(records):
        console.print(short)
    for group in GROUPS:
        draw(folder / f"{data}-{group}.png", data, group, records)


def table(data: str, records: Sequence[Record]) -> Table:
    """A table with one row a setting; factors compare with float32 and the whole model.

    "to FedAvg" is the difference of accuracy in points between runs with the same seed: mean
    (lowest, highest).
    """
    shown = Table(title=f"{data}: {max(r['rounds'] for r in records)} rounds", box=None)
    for title in ("setting", "keep", "down", "up", "download", "upload", "compute", "accuracy",
                  "lowest", "highest", "to FedAvg", "seeds"):  # fmt: skip
        is_text = title in ("setting", "down", "up")
        shown.add_column(title, justify="left" if is_text else "right")
    rows = runs.by_setting(records, ORDER)
    base = rows.get(BASELINE.name, [])
    for name, group in rows.items():
        final = [runs.last(record) for record in group]
        first = group[0]
        flops = base[0]["train_flops"] / first["train_flops"] if base else float("nan")
        shown.add_row(
            name,
            f"{first['setting']['keep_rate']:g}",
            first["setting"]["down"],
            first["setting"]["up"],
            f"{factor(group, 'bytes_down'):.1f}x",
            f"{factor(group, 'bytes_up'):.1f}x",
            f"{flops:.2f}x",
            f"{100 * statistics.fmean(final):.2f}",
            f"{100 * min(final):.2f}",
            f"{100 * max(final):.2f}",
            runs.gaps(group, base),
            str(len(group)),
        )
    return shown


def factor(records: Sequence[Record], key: str) -> float:
    """How many times more bytes the whole model takes as float32."""
    return float(records[0]["float32_bytes"] / statistics.fmean(r[key] for r in records))


def draw(path: Path, data: str, group: str, records: Sequence[Record]) -> None:
    """Draw accuracy over rounds for a group's settings and the baseline, with bands low to high."""
    from matplotlib.figure import Figure

    names = {setting.name for setting in (BASELINE, *GROUPS[group])}
    rows = runs.by_setting(records, ORDER)
    shown = {name: setting_runs for name, setting_runs in rows.items() if name in names}
    if len(shown) < 2:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    runs.draw(axes, shown, "accuracy", base=BASELINE.name)
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy on the test set, %")
    axes.set_title(f"{data}: {group}")
    figure.savefig(path, dpi=110)
