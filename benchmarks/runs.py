"""Many runs of `orchestrator.simulation.simulate`, one for each setting and seed; their records.

    OUT/data-DATA-SEED/          images, dealt out once for all settings of a seed
    OUT/DATA-SETTING-SEED/       a run's folder, from which a stopped run goes on
    OUT/DATA-SETTING-SEED.json   a finished run's record
    OUT/DATA.json                all records

A record has a "setting" with its "name", a "seed", "rounds", and accuracies as {round: accuracy}.
Each run has its own process, and so its own threads of torch.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import command
from benchmarks.race import ContenderError
from wire.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from orchestrator.config import RunConfig
    from orchestrator.datasets import Split
    from orchestrator.display.report import Report

Record = dict[str, Any]
UNFINISHED = 3
DASHES = ("-", "--", ":")
BESIDE = 8  # a legend with more lines goes beside the picture


class TimeIsUp(Exception):  # noqa: N818 - nothing went wrong
    """Rounds are left after the time of --pieces."""


def add_options(
    parser: argparse.ArgumentParser,
    *,
    data: Sequence[str],
    settings: str,
    out: str,
    rounds: int | None,
    devices: int | None,
    eval_every: int | None,
) -> None:
    """Add the options that all such benchmarks share, with the defaults of this one."""
    parser.add_argument("--data", choices=tuple(data), default=data[0])
    parser.add_argument("--train", default="", help=".npz of the training set; default: download")
    parser.add_argument("--heldout", type=Path, help=".npz of the test set, with --train")
    parser.add_argument("--settings", default=settings, help="groups or names, separated by ;")
    parser.add_argument("--rounds", type=command.count, default=rounds)
    parser.add_argument("--seeds", type=command.count, default=3)
    parser.add_argument("--devices", type=command.count, default=devices)
    parser.add_argument("--per-device", type=command.count, help="samples on each; default: all")
    parser.add_argument("--eval-every", type=command.count, default=eval_every)
    parser.add_argument("--engine", choices=("torch", "onnx"), default="torch",
                        help="what trains simulated devices; onnx is faster on a CPU")  # fmt: skip
    parser.add_argument("--jobs", type=command.count, default=1, help="runs at once")
    parser.add_argument("--threads", type=command.count, default=1, help="for each run")
    parser.add_argument("--pieces", type=_minutes, metavar="MINUTES",
                        help="after so long begin no more rounds, and exit with 3")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)


def main(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    measure: Callable[[argparse.Namespace], None],
) -> int:
    """Measure; return 0, 2 like `command.run`, or 3 if rounds are left after --pieces."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser.set_defaults(arguments=words)
    try:
        return command.run(parser, words, measure)
    except TimeIsUp as unfinished:
        print(unfinished)
        return UNFINISHED


def do(
    options: argparse.Namespace,
    module: str,
    names: Sequence[str],
    done: Callable[[str, int], bool],
    report: Callable[[], None],
    *,
    first: Callable[[str], str] = lambda _: "",
) -> None:
    """Do all runs of the settings `names` that are not done, then the report.

    Args:
        options: of the command line.
        module: the benchmark; each run is a process of it.
        names: the settings.
        done: whether the run of a setting and seed is done.
        report: writes the report.
        first: for a setting, an earlier one whose run must end first; "" for none.

    Raises:
        ContenderError: runs failed; their processes have printed why.
        TimeIsUp: rounds are left.
    """
    until = time.monotonic() + 60 * (options.pieces or math.inf)
    jobs = [(name, seed) for seed in range(options.seeds) for name in names]
    ended = {job: threading.Event() for job in jobs}

    def spawn(job: tuple[str, int]) -> int:
        name, seed = job
        if first(name):
            ended[first(name), seed].wait()
        try:
            return begin(name, seed)
        finally:
            ended[job].set()

    def begin(name: str, seed: int) -> int:
        seconds = until - time.monotonic()
        if done(name, seed):
            return 0
        if seconds <= 0:
            return UNFINISHED
        print(f"{options.data}, seed {seed}: {name}", flush=True)
        one = {"name": name, "seed": seed, "seconds": seconds if options.pieces else None}
        line = [sys.executable, "-m", module, *options.arguments, "--one", json.dumps(one)]
        return subprocess.run(line, check=False).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(spawn, jobs))
    report()
    if failed := sum(code not in (0, UNFINISHED) for code in codes):
        raise ContenderError(f"{failed} of {len(jobs)} runs failed; start again to go on with them")
    if unfinished := codes.count(UNFINISHED):
        raise TimeIsUp(f"{unfinished} of {len(jobs)} runs are not done; the same command goes on")


def simulate(
    options: argparse.Namespace,
    config: "RunConfig",
    shards: Path,
    seconds: float | None,
    **more: Any,
) -> None:
    """Do one run, in this process.

    Args:
        options: of the command line.
        config: the run's settings.
        shards: the folder with the shards of images.
        seconds: stop after the round in which so many seconds have passed; None sets no limit.
        more: further arguments of `orchestrator.simulation.simulate.run`.

    Raises:
        TimeIsUp: rounds are left.
    """
    from orchestrator.simulation import simulate

    simulate.hold_threads(options.threads)
    changed = watch(config, seconds)
    simulate.run(config, shards, engine=options.engine, changed=changed, **more)


def watch(config: "RunConfig", seconds: float | None) -> Callable[["Report"], None]:
    """A function to call after each round, which raises TimeIsUp when the time is over."""
    began = time.monotonic()

    def changed(report: "Report") -> None:
        reached = len(report.entries)
        if seconds is not None and time.monotonic() - began >= seconds and reached < config.rounds:
            raise TimeIsUp(f"{config.name}: {reached} of {config.rounds} rounds")

    return changed


def deal(
    folder: Path,
    source: str,
    *,
    devices: int,
    seed: int,
    per_device: int | None = None,
    split: "Split" = "iid",
    alpha: float = 0.5,
    heldout: Path | None = None,
    heldout_samples: int | None = None,
) -> None:
    """Deal images out to devices (`orchestrator.datasets.build`), unless that is done already.

    Raises:
        SettingsError: the images in the folder were dealt out in another way.
        DataError: the source cannot be read, or not dealt out in this way.
    """
    from orchestrator import datasets

    if not (folder / "split.json").exists():
        datasets.build(
            source,
            folder,
            devices=devices,
            per_device=per_device,
            split=split,
            alpha=alpha,
            seed=seed,
            heldout=heldout,
            heldout_samples=heldout_samples,
        )
        return
    dealt = json.loads((folder / "split.json").read_text())
    first = dealt["devices"][0]["samples"]
    for what, there, wanted in (
        ("devices", len(dealt["devices"]), devices),
        ("samples a device", first, per_device or first),
        ("as its source", dealt["source"], Path(source).name),
        ("as its split", dealt["split"], split),
        ("as its alpha", dealt["alpha"], alpha if split == "dirichlet" else None),
    ):
        if there != wanted:
            raise SettingsError(
                f"{folder} was dealt out with {there} {what}, now it is {wanted}; write to another "
                "--out"
            )


def data_folder(folder: Path, data: str, seed: int) -> Path:
    """The folder with the shards of a seed."""
    return folder / f"data-{data}-{seed}"


def title(data: str, setting: str, seed: int) -> str:
    """A run's name, which its folder and its record have too."""
    slug = "".join(c if c.isalnum() or c == "." else "-" for c in setting)
    return f"{data}-{slug}-{seed}"


def keep(config: "RunConfig", folder: Path, record: Record) -> None:
    """Write a finished run's record."""
    (folder / f"{config.name}.json").write_text(json.dumps(record, indent=1) + "\n")


def is_done(folder: Path, data: str, setting: str, seed: int, rounds: int) -> bool:
    """Whether there is a run's record with at least so many rounds."""
    path = folder / f"{title(data, setting, seed)}.json"
    return path.exists() and json.loads(path.read_text())["rounds"] >= rounds


def adopt(folder: Path, data: str) -> list[Record]:
    """The records in a folder's DATA.json, each written to its own file where that is missing.

    So runs that were done elsewhere count as done if only their DATA.json is copied here.

    Raises:
        SettingsError: DATA.json is damaged.
    """
    path = folder / f"{data}.json"
    try:
        records: list[Record] = json.loads(path.read_text())
        for record in records:
            own = folder / f"{title(data, record['setting']['name'], record['seed'])}.json"
            if not own.exists():
                own.write_text(json.dumps(record, indent=1) + "\n")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as fault:
        raise SettingsError(f"{path} is damaged ({fault}); restore or remove it") from fault
    return records


def collect(folder: Path, data: str) -> list[Record]:
    """All records of a data set; also writes them to one file."""
    paths = sorted(folder.glob(f"{data}-*-[0-9]*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    if records:
        (folder / f"{data}.json").write_text(json.dumps(records, indent=1) + "\n")
    return records


def by_setting(records: Sequence[Record], order: Iterable[str]) -> dict[str, list[Record]]:
    """The records with the most rounds, by setting, in the given order of settings."""
    rounds = max(record["rounds"] for record in records)
    grouped = defaultdict(list)
    for record in records:
        if record["rounds"] == rounds:
            grouped[record["setting"]["name"]].append(record)
    return {name: grouped[name] for name in order if name in grouped}


def left_out(records: Sequence[Record]) -> str:
    """The runs that `by_setting` leaves out, in words; "" if there are none."""
    longest = max(record["rounds"] for record in records)
    short = [f"{r['setting']['name']} (seed {r['seed']})" for r in records if r["rounds"] < longest]
    return f"left out, with fewer than {longest} rounds: {', '.join(short)}" if short else ""


def last(record: Record, key: str = "accuracy") -> float:
    """Accuracy after the last round."""
    return float(record[key][str(record["rounds"])])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and lowest to highest of several values; "" of none."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    reach = f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"
    return reach if len(values) > 1 else mean


def gaps(runs: Sequence[Record], base: Sequence[Record], key: str = "accuracy") -> str:
    """How much better runs are than the base's of the same seed: mean (lowest, highest), points."""
    points = [
        100 * (last(r, key) - last(b, key)) for r in runs for b in base if r["seed"] == b["seed"]
    ]
    if not points:
        return ""
    return f"{statistics.fmean(points):+.2f} ({min(points):+.2f}, {max(points):+.2f})"


def draw(
    axes: "Axes",
    runs: dict[str, list[Record]],
    key: str,
    *,
    base: str,
    across: Callable[[Record, int], float] = lambda _, number: number,
) -> None:
    """Draw a curve of accuracy for each setting, the base in black, with bands from low to high.

    Args:
        axes: to draw on.
        runs: records by setting.
        key: the accuracies' key in a record; settings without it are not drawn.
        base: the setting to compare with.
        across: the horizontal coordinate for a record and a round; its mean over seeds is drawn.
    """
    lowest = 100.0
    looks = {name: number for number, name in enumerate(n for n in runs if n != base)}
    for name, records in runs.items():
        # A run that was extended has been evaluated at its former end as well.
        rounds = sorted(set.intersection(*({int(r) for r in m[key]} for m in records)))
        if not rounds:
            continue
        curves = [[100 * record[key][str(r)] for r in rounds] for record in records]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        at = [statistics.fmean(across(record, r) for record in records) for r in rounds]
        # A setting looks the same in all pictures of a group; colours repeat after ten.
        colour, dash = "black", "-"
        if name != base:
            colour = f"C{looks[name] % 10}"
            dash = DASHES[looks[name] // 10 % len(DASHES)]
        axes.plot(at, mean, dash, label=name, color=colour, linewidth=2 if name == base else 1.5)
        if len(records) > 1:
            low, high = zip(*((min(v), max(v)) for v in zip(*curves, strict=True)), strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        lowest = min(lowest, *mean[len(mean) // 4 :])
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.set_ylim(max(0.0, lowest - 2), None)
        if len(axes.lines) > BESIDE:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            axes.legend(fontsize="small")


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected minutes over 0, got {text!r}")
    return value
