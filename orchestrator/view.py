"""What a person sees in the terminal: the run while it goes on, and its table in the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def percent(share: float | None) -> str:
    """An accuracy for people; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def live(snapshot: Mapping[str, Any]) -> Group:
    """The run as it stands, for a live display."""
    head = Text.assemble(
        (snapshot["run"], "bold"),
        f"  {snapshot['strategy']}  round {snapshot['round']} of {snapshot['rounds']}  ",
        (snapshot["phase"], "cyan"),
    )
    what, done, total = snapshot["work"]
    devices = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("device", "", "", "memory", "up", "down"):
        devices.add_column(title, justify="right" if title in ("memory", "up", "down") else "left")
    for name, device in snapshot["devices"].items():
        working = device["stand"] in ("fetch", "train", "extract")
        devices.add_row(
            Text(name, style="" if device["live"] else "dim strike"),
            device["stand"] if device["live"] else "away",
            ProgressBar(device["total"] or 1, device["done"], width=20) if working else "",
            size(device["memory_bytes"]),
            size(device["bytes_up"]),
            size(device["bytes_down"]),
        )
    parts: list[Any] = [head, devices]
    if total:
        parts.append(Text.assemble("server ", (what, "cyan"), f" {done}/{total}"))
    if snapshot["history"]:
        parts.append(rounds(snapshot["history"]))
    return Group(*parts)


def rounds(history: Sequence[Mapping[str, Any]]) -> Table:
    """One row a round; device figures are means over those that took part."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("round", "server", "device", "up/device", "down/device", "seconds", "devices"):
        table.add_column(title, justify="right")
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
    """One row a device: what its work cost over the whole run."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("device", "samples", "peak memory", "FLOPs", "train", "up", "down"):
        table.add_column(title, justify="left" if title == "device" else "right")
    for name in sorted({name for entry in history for name in entry["devices"]}):
        mine = [e["devices"][name] for e in history if e["devices"].get(name, {}).get("accepted")]
        if not mine:
            continue
        peak = max(max(d.get("train_peak_bytes", 0), d.get("extract_peak_bytes", 0)) for d in mine)
        flops = sum(d.get("train_flops", 0) + d.get("extract_flops", 0) for d in mine)
        table.add_row(
            name,
            str(mine[-1]["samples"]),
            size(peak),
            f"{flops / 1e9:.1f} G",
            f"{sum(d.get('train_s', 0) for d in mine):.1f} s",
            size(sum(d["bytes_up"] for d in mine)),
            size(sum(d["bytes_down"] for d in mine)),
        )
    return table


def _mean(devices: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(d[key] for d in devices)) / max(len(devices), 1)
