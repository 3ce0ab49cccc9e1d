"""What a person sees in the terminal: a live view of the run, and tables at its end."""

import logging
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.display.words import percent, progress, size, time_left
from wire import logs

if TYPE_CHECKING:
    from orchestrator.display.report import Report

log = logging.getLogger("orchestrator")

# What a device does, in the order in which a person should look at it.
STANDS = ("failed", "refused", "ordered", "fetch", "train", "extract", "away", "waiting",
          "returned", "idle")  # fmt: skip
NEWEST = 5  # most rounds that a live view shows
LOG_LINES = 4  # lines of the terminal that a live view leaves to the log
ROOMY = 18  # in a view of so many lines or more, a text may take two lines
WORKING = ("fetch", "train", "extract")
REFRESH_S, LOGGED_S = 0.25, 30.0


class Display:
    """Shows the run while it goes on: a live view on a terminal, only log lines elsewhere.

    Args:
        console: where the view and the log go.
        simulated: show one line of progress instead of the view; without a terminal it is logged
            now and then.
    """

    def __init__(self, console: Console, *, simulated: bool = False) -> None:
        self._console, self._simulated = console, simulated
        # Not console.is_terminal, which obeys FORCE_COLOR: a file must never get control codes.
        self._terminal = console.file.isatty() and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._shown = time.monotonic()

    def __enter__(self) -> Callable[["Report"], None]:
        """Begin; return a function to call with the report whenever something has happened."""
        if not self._terminal:
            logs.to_stream(self._console.file)
            return self._show if self._simulated else lambda _: None
        handler = RichHandler(
            console=self._console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(logs.OneLine("%(message)s"))
        logs.to_handler(handler)
        self._live.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        """Remove the view from the terminal."""
        if self._terminal:
            self._live.stop()

    def _show(self, report: "Report") -> None:
        now = time.monotonic()
        if now - self._shown < (REFRESH_S if self._terminal else LOGGED_S):
            return
        self._shown = now
        snapshot, (width, height) = report.snapshot(), self._console.size
        if not self._terminal:
            log.info("%s", progress(snapshot))
        elif self._simulated:
            line = Text(f"{snapshot['run']}  {progress(snapshot)}")
            line.truncate(width, overflow="ellipsis")
            self._live.update(line)
        else:
            self._live.update(live(snapshot, width, max(height - LOG_LINES, 3)))


def live(snapshot: Mapping[str, Any], width: int = 80, height: int | None = None) -> Group:
    """A view of the run: a summary, failing and slowest devices, the newest rounds.

    Args:
        snapshot: from `Report.snapshot`.
        width: columns of the terminal.
        height: lines that the view may take; None shows every device and round.
    """
    devices: Mapping[str, Mapping[str, Any]] = snapshot["devices"]
    history = snapshot["history"]
    head = Text.assemble(
        (snapshot["run"], "bold"),
        f"  {snapshot['strategy']}  round {snapshot['round']} of {snapshot['rounds']}  ",
        (snapshot["phase"], "cyan"),
    )
    lines = [head, *map(Text, filter(None, [time_left(snapshot)]))]
    what, done, total = snapshot["work"]
    if total:
        lines.append(Text.assemble("server ", (what, "cyan"), f" {done}/{total}"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    deep = 1 if height is not None and height < ROOMY else 2
    lines += _wrapped(snapshot.get("awaited", ""), width, deep)
    lines += _wrapped(summary(devices) if devices else "", width, deep)
    faults = {name: device["fault"] for name, device in devices.items() if device.get("fault")}
    for name in sorted(faults)[: None if height is None else deep]:
        what = "refused" if devices[name]["stand"] == "refused" else "failed"
        lines += _wrapped(logs.clean(f"{name} {what}: {faults[name]}"), width, deep, "red")
    shown = sorted(devices)
    if height is not None:
        # Each table has a blank line and a header. Devices take the lines that rounds leave.
        room = height - len(lines)
        history = history[-min(NEWEST, room // 2 - 2) :] if room >= 6 else []
        room -= len(history) + 2 if history else 0
        order = shown if len(shown) <= room - 2 else _slowest(snapshot)
        shown, lines = order[: max(room - 2, 0)], lines[:height]
    parts: list[Any] = list(lines)
    if shown:
        title = "device" if len(shown) == len(devices) else "slowest devices"
        parts += [Text(), _table(title, {name: devices[name] for name in shown}, width)]
    if history:
        parts += [Text(), rounds(history, width)]
    return Group(*parts)


def stand(device: Mapping[str, Any]) -> str:
    """What a device is doing: `away`, or its stand in the round."""
    return str(device["stand"]) if device["live"] else "away"


def summary(devices: Mapping[str, Mapping[str, Any]]) -> str:
    """How many devices are doing what: `40 devices: 22 train, 3 fetch, 2 away`."""
    counts = Counter(stand(device) for device in devices.values())
    parts = [f"{counts[name]} {name}" for name in STANDS if counts[name]]
    number = f"{len(devices)} device{'s' if len(devices) > 1 else ''}"
    return f"{number}: {', '.join(parts)}"


def _slowest(snapshot: Mapping[str, Any]) -> list[str]:
    """All devices: failing ones first, then by progress; done, waiting and absent ones last."""
    devices = snapshot["devices"]
    before = snapshot["history"][-1]["devices"] if snapshot["history"] else {}

    def key(name: str) -> tuple[int, float, float, str]:
        device = devices[name]
        share = device["done"] / (device["total"] or 1)
        return STANDS.index(stand(device)), share, -before.get(name, {}).get("train_s", 0.0), name

    return sorted(devices, key=key)


def _wrapped(text: str, width: int, deep: int, style: str = "") -> list[Text]:
    """A text in `deep` lines at most."""
    lines = textwrap.wrap(
        text, max(width, 10), max_lines=deep, placeholder=" \N{HORIZONTAL ELLIPSIS}"
    )
    return [Text(line, style=style) for line in lines]


def short(name: str, most: int) -> str:
    """A name in at most so many characters (3 or more); its ends stay, since names differ there."""
    if len(name) <= most:
        return name
    half = most // 2
    return f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[half - most :]}"


def _table(title: str, devices: Mapping[str, Mapping[str, Any]], width: int) -> Table:
    """A table with one line a device; a narrow terminal loses columns, never lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    most = max(width - 60, 16)
    table.add_column(title, no_wrap=True)
    table.add_column("", no_wrap=True, width=8)
    table.add_column("", no_wrap=True, width=min(20, max(width - 58, 6)))
    sizes = [("memory", "memory_bytes"), ("up", "bytes_up"), ("down", "bytes_down")]
    sizes = sizes[: max((width - 36) // 10, 0)]
    for what, _ in sizes:
        table.add_column(what, justify="right", no_wrap=True)
    for name, device in devices.items():
        working = device["live"] and device["stand"] in WORKING
        table.add_row(
            Text(short(name, most), style="" if device["live"] else "dim"),
            Text(stand(device), style="red" if stand(device) in ("failed", "refused") else ""),
            ProgressBar(device["total"] or 1, device["done"]) if working else "",
            *(size(device[key]) for _, key in sizes),
        )
    return table


def rounds(history: Sequence[Mapping[str, Any]], width: int = 80) -> Table:
    """A table with one row a round; device figures are means over the accepted devices."""
    table = Table(box=None, pad_edge=False, padding=(0, 3 if width >= 72 else 1, 0, 0))
    for title in ("round", "server", "device", "up/device", "down/device", "seconds", "devices"):
        table.add_column(title, justify="right", no_wrap=True)
    for entry in history:
        joined = [d for d in entry["devices"].values() if d.get("accepted")]
        table.add_row(
            str(entry["round"]),
            percent(entry.get("server_accuracy")),
            percent(entry.get("device_accuracy")),
            size(_mean(joined, "bytes_up")),
            size(_mean(joined, "bytes_down")),
            f"{entry['seconds']:.1f}",
            f"{len(joined)}/{len(entry['cohort'])}",
        )
    return table


def agents(history: Sequence[Mapping[str, Any]]) -> Table:
    """A table with one row a device: the costs of its accepted work over the whole run."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("device", "samples", "peak memory", "FLOPs", "train", "up", "down"):
        table.add_column(title, justify="left" if title == "device" else "right")
    for name in sorted({name for entry in history for name in entry["devices"]}):
        turns = [e["devices"][name] for e in history if e["devices"].get(name, {}).get("accepted")]
        if not turns:
            continue
        peak = max(max(d.get("train_peak_bytes", 0), d.get("extract_peak_bytes", 0)) for d in turns)
        flops = sum(d.get("train_flops", 0) + d.get("extract_flops", 0) for d in turns)
        table.add_row(
            name,
            str(turns[-1]["samples"]),
            size(peak),
            f"{flops / 1e9:.1f} G",
            f"{sum(d.get('train_s', 0) for d in turns):.1f} s",
            size(sum(d["bytes_up"] for d in turns)),
            size(sum(d["bytes_down"] for d in turns)),
        )
    return table


def _mean(devices: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(d[key] for d in devices)) / max(len(devices), 1)
