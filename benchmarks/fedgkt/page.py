"""The tables of docs/fedgkt.md, written from the committed records of its runs.

    python -m benchmarks.fedgkt.page

Nothing is run. Each row is one setting and says in full how its runs were set. Accuracies are in
percent after the last round: the mean of the seeds, and lowest to highest where there are several.
"averaged views" is the server's accuracy by its mean logits over several views of an image. "sent"
is megabytes (10^6 bytes) of all devices and rounds, up and down; "minutes" are those of server
training, and of the whole run.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import runs
from benchmarks.fedgkt.report import AVERAGED, DEVICE, SERVER, megabytes
from benchmarks.fedgkt.settings import FEATURES
from benchmarks.runs import Record

RECORDS = Path(__file__).parents[2] / "docs" / "fedgkt"

Setting = Mapping[str, Any]  # the "setting" of a record


@dataclass(frozen=True)
class PageTable:
    """One table of the page.

    Attributes:
        records: the file of the records, without `.json`.
        columns: what the rows are told apart by; keys of `COLUMNS`, or "bytes a sample and round".
        rows: names of settings.
    """

    records: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]


def _read(table: str, key: str, default: object) -> Callable[[Setting], Any]:
    return lambda setting: setting["change"].get(table, {}).get(key, default)


_codec = _read("device", "features", FEATURES)
_others = _read("device", "others", ())
_freeze_after = _read("transfer", "freeze_after", None)
_views = _read("transfer", "views", False)
_student_views = _read("transfer", "student_views", True)
_resend = _read("transfer", "resend", 0.0)


def _escaped(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _frozen(setting: Setting) -> str:
    rounds = _freeze_after(setting)
    return "never" if rounds is None else f"{rounds} round{'s' * (rounds != 1)}"


def _views_of(setting: Setting) -> str:
    if not _views(setting):
        return "nobody"
    return "server, devices" if _student_views(setting) else "server"


def _training(setting: Setting) -> str:
    if setting["devices"] == 1:
        return "one machine with all images"
    if setting["change"]["strategy"] == "local":
        return "each device alone"
    return "all devices, by FedAvg"


def _difference(setting: Setting) -> str:
    """What a setting has that the base run has not, in words; empty for the base run."""
    parts = []
    if setting["late"]:
        parts.append(f"{100 * setting['late']:.0f} % of the devices are late in each round")
    if setting["start"]:
        parts.append(f"both halves begin with the network that `{setting['start']}` trained")
    if _freeze_after(setting) is not None:
        parts.append(f"the extractors are frozen after {_frozen(setting)}")
    if _resend(setting):
        parts.append(
            "feature maps are sent again only when they changed by more than "
            f"{100 * _resend(setting):g} %"
        )
    if _others(setting):
        parts.append("three devices train ResNet-4, three ResNet-6, four ResNet-8")
    return "; ".join(parts)


COLUMNS: dict[str, Callable[[Setting], str]] = {
    "setting": lambda setting: _escaped(setting["name"]),
    "codec": lambda setting: _escaped(_codec(setting)),
    "`device.alpha`": lambda setting: f"{_read('device', 'alpha', 1.0)(setting):g}",
    "`server.alpha`": lambda setting: f"{_read('server', 'alpha', 1.0)(setting):g}",
    "large network": lambda setting: _escaped(
        setting["change"].get("server", {}).get("model", "fastcnn6-64")
    ),
    "extractor": _read("transfer", "extractor", "own"),
    "frozen after": _frozen,
    "small network": _read("transfer", "network", "own"),
    "device networks": lambda setting: "ResNet-4, 6, 8" if _others(setting) else "ResNet-8",
    "views seen by": _views_of,
    "network": lambda setting: "ResNet-11" if setting["whole"] else "ResNet-8",
    "trained by": _training,
    "difference from `two-way`": _difference,
}

PEERS = ("setting", "network", "trained by")
ALPHAS = ("setting", "`device.alpha`", "`server.alpha`")
FRUGAL = ("codec", "`device.alpha`", "`server.alpha`", "small network", "views seen by")
TABLES = (
    PageTable("cifar10-full", ("setting", "large network", "codec", "extractor", "frozen after"),
              ("best",)),
    PageTable("cifar10-cpu", PEERS,
              ("centralized", "fedavg large", "fedavg resnet8", "resnet8 alone")),
    PageTable("cifar10-cpu", ALPHAS, ("none", "to server", "to devices", "two-way")),
    PageTable("cifar10-cpu", ("setting", "difference from `two-way`"),
              ("on change", "freeze after 1", "resnet4, 6 and 8", "from centralized",
               "30 % late")),
    PageTable("cifar10-cpu", ("setting", *FRUGAL, "frozen after", "device networks"),
              ("frugal, none", "frugal, q=2", "frugal, to devices", "frugal, resnet4, 6 and 8",
               "frugal, shared", "frugal, shared, frozen after 3",
               "frugal, shared, plain students", "frugal, q=4", "frugal, float32")),
    PageTable("cifar10-dirichlet-cpu", PEERS, ("fedavg large", "fedavg resnet8")),
    PageTable("cifar10-dirichlet-cpu", ALPHAS, ("none", "to devices", "two-way")),
    PageTable("cifar10-dirichlet-cpu", ("setting", *FRUGAL),
              ("frugal, to devices", "frugal, shared", "frugal, shared, plain students")),
    PageTable("cifar10-cpu", ("codec", "bytes a sample and round"),
              ("float32", "relu|q=8|zstd", "two-way", "relu|q=3|zstd", "relu|q=2|zstd",
               "relu|q=1.5|zstd", "relu|q=1|zstd")),
    PageTable("cifar10-uplink", PEERS, ("fedavg large",)),
    PageTable("cifar10-uplink", ("setting", *FRUGAL[:3], "extractor", "frozen after",
                                 "views seen by"),
              ("two-way", "none", "to server", "to devices", "relu|q=1|zstd", "shared",
               "freeze after 1", "every round, views", "shared, freeze after 1, views",
               "frugal, q=2", "frugal, q=1", "frugal, to devices")),
)  # fmt: skip


def write(table: PageTable, records: Sequence[Record]) -> str:
    """A table in Markdown, one row a setting.

    Raises:
        KeyError: a setting has no record.
    """
    by_setting = runs.by_setting(records, table.rows)
    several = max(map(len, by_setting.values())) > 1
    large = any(record.get(AVERAGED) for record in records)
    titles = (*table.columns, *(("seeds",) if several else ()), "server, %",
              *(("averaged views, %",) if large else ()), "devices, %", "sent, MB",
              *(("minutes",) if large else ()))  # fmt: skip
    lines = [_line(titles), "|---" * len(titles) + "|"]
    for name in table.rows:
        own = by_setting[name]
        setting = {"start": "", **own[0]["setting"]}
        cells = [COLUMNS[c](setting) if c in COLUMNS else _feature_bytes(own)
                 for c in table.columns]  # fmt: skip
        cells += [str(len(own))] if several else []
        server, averaged, device = (_accuracy(own, key) for key in (SERVER, AVERAGED, DEVICE))
        if not device and not setting["whole"]:  # FedAvg of the devices' network
            server, device = device, server
        sent = statistics.fmean(megabytes(record, record["rounds"]) for record in own)
        cells += [server, *([averaged] if large else []), device, f"{sent:,.1f}"]
        cells += [_minutes(own)] if large else []
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _feature_bytes(records: Sequence[Record]) -> str:
    return f"{statistics.fmean(record['feature_bytes'] for record in records):,.0f}"


def _minutes(records: Sequence[Record]) -> str:
    """Minutes of server training, if there was any, and of the whole run."""
    server, whole = (
        statistics.fmean(record[key] for record in records) / 60
        for key in ("server_train_s", "seconds")
    )
    return f"{server:.0f}, {whole:.0f}" if server else f"{whole:.0f}"


def _accuracy(records: Sequence[Record], key: str) -> str:
    """Mean of the seeds, and lowest to highest of several; empty where it was not evaluated."""
    if not all(record.get(key) for record in records):
        return ""
    return runs.spread([100 * runs.last(record, key) for record in records])


def read(table: PageTable) -> list[Record]:
    """The records that a table is made of."""
    records: list[Record] = json.loads((RECORDS / f"{table.records}.json").read_text())
    return records


if __name__ == "__main__":
    print("\n".join(write(table, read(table)) for table in TABLES), end="")
