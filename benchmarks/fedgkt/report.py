"""Results of the runs: a record of each, the table on the terminal, and the pictures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import models
from benchmarks import runs
from benchmarks.fedgkt import over_wire, settings
from benchmarks.fedgkt.settings import GROUPS, ORDER, Plan, Setting
from benchmarks.runs import Record
from ondevice import meter
from orchestrator.config import RunConfig
from wire import tensors
from wire.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERVER, DEVICE = "server_accuracy", "device_accuracy"
AVERAGED = "server_accuracy_averaged"  # by mean logits over several views of an image
MARKS = {3072: ("--", "3,072 bytes, the raw image"), 1024: (":", "1,024 bytes")}


def check(plan: Plan, folder: Path) -> None:
    """Refuse a folder that was begun with another plan: its runs could not be compared.

    Raises:
        SettingsError: the plans differ; the message names the options and both values. Or records
            in the folder are damaged.
    """
    path = _options(plan, folder)
    records = runs.adopt(folder, plan.data)
    if path.exists():
        before = json.loads(path.read_text())
    elif records:
        before = records[0]["options"]
    else:
        return
    now = asdict(plan)
    differ = [f"{k} {before.get(k)} (now {now[k]})" for k in now if before.get(k) != now[k]]
    if differ:
        raise SettingsError(f"{folder} was begun with {', '.join(differ)}; write to another --out")


def claim(plan: Plan, folder: Path) -> None:
    """Write the plan into a folder, which takes no other plan from then on."""
    _options(plan, folder).write_text(json.dumps(asdict(plan), indent=1) + "\n")


def _options(plan: Plan, folder: Path) -> Path:
    return folder / f"{plan.data}-options.json"


def keep(config: RunConfig, setting: Setting, plan: Plan) -> None:
    """Write the record of a finished run: accuracies, bytes and FLOPs."""
    rounds = json.loads((config.folder / "report.json").read_text())["rounds"]
    joined = [d for entry in rounds for d in entry["devices"].values() if d.get("accepted")]
    record = {
        "setting": asdict(setting),
        "seed": config.seed,
        "rounds": len(rounds),
        "options": asdict(plan),
        "features": config.device.features,
        "devices": config.cohort.min_devices,
        "refused": sum(len(entry["cohort"]) for entry in rounds) - len(joined),
        **{
            key: {e["round"]: e[key] for e in rounds if key in e}
            for key in (SERVER, AVERAGED, DEVICE)
        },
        **{
            way: {e["round"]: sum(d.get(way, 0) for d in e["devices"].values()) for e in rounds}
            for way in ("bytes_up", "bytes_down")
        },
        "feature_bytes": _feature_bytes(config, joined),
        "train_flops": statistics.fmean(d["train_flops"] for d in joined),
        "seconds": sum(entry["seconds"] for entry in rounds),
        "server_train_s": sum(entry.get("server_train_s", 0.0) for entry in rounds),
        "peak_bytes": meter.resident_bytes("VmHWM"),
        **_measured_over_wire(config, plan, joined),
    }
    runs.keep(config, config.runs, record)


def _measured_over_wire(
    config: RunConfig, plan: Plan, joined: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Bytes that the broker counted, and the largest peak of an agent's memory."""
    if plan.engine != "agents":
        return {}
    peaks = [value for d in joined for key, value in d.items() if key.endswith("_peak_bytes")]
    return {"broker_bytes": over_wire.traffic(config), "agent_peak_bytes": max(peaks)}


def _feature_bytes(config: RunConfig, joined: Sequence[Mapping[str, Any]]) -> float | None:
    """Bytes a sample and round of feature maps, logits and label, without the weights."""
    if config.strategy != "fedgkt":
        return None
    device = config.device
    model = models.build(device.network, classes=device.class_count, input_shape=device.input)
    weights = {n: t.numpy() for n, t in model.state_dict().items() if t.is_floating_point()}
    packed = len(tensors.pack(tensors.weights(weights, "float32"), seed=0))
    sent = sum(d["bytes_up"] for d in joined) - packed * len(joined)
    return float(sent / sum(d["samples"] for d in joined))


def write(folder: Path, plan: Plan) -> None:
    """Write all records of a data set as one file, print the table, and draw the pictures."""
    records = runs.collect(folder, plan.data)
    if not records:
        return
    console = Console()
    console.width = max(console.width, 170)
    console.print(table(plan.data, records))
    if short := runs.left_out(records):
        console.print(short)
    shown = runs.by_setting(records, ORDER)
    for name in GROUPS:
        if settings.base_of(name) != settings.base(shown):
            continue
        chosen = {s.name: shown[s.name] for s in settings.group(name, plan.devices)
                  if s.name in shown}  # fmt: skip
        _draw_rounds(folder / f"{plan.data}-{name}.png", f"{plan.data}: {name}", chosen, shown)
        if name == "payload":
            _draw_payload(folder / f"{plan.data}-payload-bytes.png", plan.data, chosen)
        if name in ("uplink", "frugal"):
            _draw_sent(folder / f"{plan.data}-{name}-bytes.png", plan.data, chosen, shown)


def table(data: str, records: Sequence[Record]) -> Table:
    """The table on the terminal, one row a setting.

    "server": accuracy of the large network, or of averaged weights, after the last round.
    "devices": mean accuracy of the devices' own networks after the last round.
    Both are means of the seeds (lowest-highest).
    "to two-way": points of accuracy above the base run with the same seed, mean (lowest, highest);
    the base run is `settings.base`.
    "up": megabytes (10^6 bytes) that a device sends in a round.
    "sent": megabytes of the whole run, up and down.
    """
    rows = runs.by_setting(records, ORDER)
    base = settings.base(rows)
    shown = Table(title=f"{data}: {max(r['rounds'] for r in records)} rounds", box=None)
    for name in ("setting", "seeds", "server", f"to {base}", "devices", f"to {base}",
                 "up", "sent", "s a round"):  # fmt: skip
        shown.add_column(name, justify="left" if name == "setting" else "right")
    for name, mine in rows.items():
        row = [name, str(len(mine))]
        for key in (SERVER, DEVICE):
            there = all(record[key] for record in mine)
            ended = [100 * runs.last(record, key) for record in mine] if there else []
            gaps = runs.gaps(mine, rows.get(base, []), key) if there else ""
            row += [runs.spread(ended, 2), gaps]
        up = statistics.fmean(
            sum(r["bytes_up"].values()) / r["rounds"] / r["devices"] for r in mine
        )
        sent = statistics.fmean(megabytes(record, record["rounds"]) for record in mine)
        seconds = statistics.fmean(record["seconds"] / record["rounds"] for record in mine)
        shown.add_row(*row, f"{up / 1e6:.3f}", f"{sent:.1f}", f"{seconds:.1f}")
    return shown


def megabytes(record: Record, number: int) -> float:
    """Megabytes sent up and down by all devices, from the first round to this one."""
    both = (record["bytes_up"], record["bytes_down"])
    return float(sum(way[str(n)] for way in both for n in range(1, number + 1))) / 1e6


def _draw_rounds(
    path: Path, title: str, chosen: dict[str, list[Record]], shown: dict[str, list[Record]]
) -> None:
    """Accuracy over rounds of a group's settings and of the base run: server and devices."""
    from matplotlib.figure import Figure

    base = settings.base(shown)
    drawn = {name: mine for name, mine in shown.items() if name in {base, *chosen}}
    if len(drawn) < 2:
        return
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, key, whose in zip(
        figure.subplots(1, 2), (SERVER, DEVICE), ("the server's", "the devices' own"), strict=True
    ):
        runs.draw(axes, drawn, key, base=base)
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy on the test set, %")
        axes.set_title(f"{title}, {whose} network")
    figure.savefig(path, dpi=110)


def _draw_payload(path: Path, data: str, chosen: dict[str, list[Record]]) -> None:
    """Accuracy after the last round over bytes of features a sample: mean and range of the seeds.

    Only seeds that all codecs have are drawn. Otherwise codecs with lucky seeds would look better.
    """
    from matplotlib.figure import Figure

    if len(chosen) < 2:
        return
    seeds = set.intersection(*({r["seed"] for r in mine} for mine in chosen.values()))
    chosen = {n: [r for r in mine if r["seed"] in seeds] for n, mine in chosen.items()}
    if not seeds:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for mine in chosen.values():
        ended = [100 * runs.last(record, SERVER) for record in mine]
        mean, at = statistics.fmean(ended), statistics.fmean(r["feature_bytes"] for r in mine)
        reach = [[mean - min(ended)], [max(ended) - mean]]
        axes.errorbar([at], [mean], reach, fmt="o", color="black", capsize=3)
        axes.annotate(mine[0]["features"], (at, mean), (6, 4), textcoords="offset points")
    for at, (dash, what) in MARKS.items():
        axes.axvline(at, color="gray", linestyle=dash, label=what)
    axes.margins(x=0.15)
    _log(axes)
    axes.set_xlabel("bytes of features a sample and round")
    axes.set_ylabel("accuracy on the test set, %")
    axes.set_title(f"{data}: codec of feature maps, the server's network after the last round")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_sent(
    path: Path, data: str, chosen: dict[str, list[Record]], shown: dict[str, list[Record]]
) -> None:
    """Accuracy over megabytes sent so far, with the base run and FedAvg of the large network."""
    from matplotlib.figure import Figure

    if len(chosen) < 2:
        return
    base = settings.base(shown)
    also = {name: shown[name] for name in (base, "fedavg large") if name in shown}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    runs.draw(axes, chosen | also, SERVER, base=base, across=megabytes)
    _log(axes)
    axes.set_xlabel("megabytes sent, up and down, all devices")
    axes.set_ylabel("accuracy on the test set, %")
    axes.set_title(f"{data}: what is sent, and what the server learns of it")
    figure.savefig(path, dpi=110)


def _log(axes: "Axes") -> None:
    """Make the horizontal axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
