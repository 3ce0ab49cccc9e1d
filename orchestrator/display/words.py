"""Sizes, shares, times and progress in words; nothing here draws on a terminal."""

from collections.abc import Mapping
from typing import Any

_UNITS = ("B", "kB", "MB", "GB", "TB")


def size(count: float) -> str:
    """Bytes for people: 1.2 MB."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def percent(share: float | None) -> str:
    """An accuracy for people; a dash if there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time for people, in two units at most: 40 s, 12 min, 3 h 20 min, 2 d 5 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def time_left(snapshot: Mapping[str, Any]) -> str:
    """The time left, with its basis; "" before the first round has ended, and at the end."""
    seconds, by = snapshot.get("left_s"), snapshot.get("left_by", 0)
    if not seconds:
        return ""
    rounds_ = "round" if by == 1 else f"{by} rounds"
    return f"about {duration(seconds)} left, by the last {rounds_}"


def progress(snapshot: Mapping[str, Any]) -> str:
    """One line about a simulated run: its round, how far that is, the time left."""
    devices = snapshot["devices"].values()
    cohort = [d for d in devices if d["stand"] != "waiting"]
    returned = sum(d["stand"] == "returned" for d in cohort)
    what, done, total = snapshot["work"]
    now = f"server: {what} {done}/{total}" if total else f"{returned} of {len(cohort)} devices done"
    parts = [f"round {snapshot['round']} of {snapshot['rounds']}", now, time_left(snapshot)]
    return ", ".join(filter(None, parts))
