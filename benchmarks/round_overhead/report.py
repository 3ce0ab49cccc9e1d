"""Turns what contenders did into figures for people and programs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from benchmarks.round_overhead.memory import Memory, Weights
from benchmarks.round_overhead.turn import Turn

FLOWER = "flower"


@dataclass
class Course:
    """The results of one contender: its turns, or why it stopped."""

    name: str
    note: str = ""
    turns: list[Turn] = field(default_factory=list)
    weights: Weights | None = None
    failed: str = ""


@dataclass(frozen=True)
class Figure:
    """A contender's figures; if it failed, only the reason.

    Attributes:
        name, note: the contender's name, and a note about it.
        failed: why it has no figures, or "".
        seconds: duration of each round, turn by turn.
        median, lowest, highest: seconds of all rounds.
        of_flower: a turn's median round divided by Flower's in the same turn; median of the turns.
        returned: how many devices' updates were aggregated in each round, for all turns.
        bytes_up, bytes_down: median bytes of a round for all devices together; None if unknown.
        weights: memory, from a separate turn.
    """

    name: str
    note: str = ""
    failed: str = ""
    seconds: tuple[tuple[float, ...], ...] = ()
    median: float | None = None
    lowest: float | None = None
    highest: float | None = None
    of_flower: float | None = None
    returned: tuple[int, ...] = ()
    bytes_up: float | None = None
    bytes_down: float | None = None
    weights: Weights | None = None


def summarize(courses: Sequence[Course]) -> list[Figure]:
    """The figures of all contenders."""
    flower = next((c for c in courses if c.name == FLOWER and not c.failed), None)
    return [_figure(course, flower) for course in courses]


def _figure(course: Course, flower: Course | None) -> Figure:
    if course.failed:
        return Figure(course.name, course.note, course.failed)
    every = [seconds for turn in course.turns for seconds in turn.seconds]
    ratio = None
    if flower:
        ratio = statistics.median(
            statistics.median(turn.seconds) / statistics.median(other.seconds)
            for turn, other in zip(course.turns, flower.turns, strict=True)
        )
    return Figure(
        course.name,
        course.note,
        seconds=tuple(turn.seconds for turn in course.turns),
        median=statistics.median(every),
        lowest=min(every),
        highest=max(every),
        of_flower=ratio,
        returned=tuple(count for turn in course.turns for count in turn.returned),
        bytes_up=_middle([count for turn in course.turns for count in turn.bytes_up]),
        bytes_down=_middle([count for turn in course.turns for count in turn.bytes_down]),
        weights=course.weights,
    )


def _middle(counts: Sequence[int]) -> float | None:
    return statistics.median(counts) if counts else None


def head(machine: Mapping[str, object], devices: int, rounds: int, turns: int) -> str:
    """What was measured, and where."""
    return (
        f"FedAvg without training, {devices} devices, 1,663,370 float32 values each way; "
        f"{turns} turns of {rounds} rounds\n"
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']} at the start; Python "
        f"{machine['python']}"
    )


def table(figures: Sequence[Figure]) -> Table:
    """A table with one line a contender."""
    shown = Table(box=None, pad_edge=False, header_style="")
    shown.add_column("")
    for title in ("s a round", "lowest - highest", "of Flower's", "up", "down", "idle", "after",
                  "peak", "server"):  # fmt: skip
        shown.add_column(title, justify="right", no_wrap=True)
    for figure in figures:
        if figure.failed:
            shown.add_row(figure.name, "-")
            continue
        shown.add_row(
            figure.name,
            f"{figure.median:.2f}",
            f"{figure.lowest:.2f} - {figure.highest:.2f}",
            "-" if figure.of_flower is None else f"{figure.of_flower:.3f}",
            _megabytes(figure.bytes_up),
            _megabytes(figure.bytes_down),
            *_memory(figure.weights),
        )
    return shown


def notes(figures: Sequence[Figure]) -> str:
    """An explanation of the table, and why contenders were left out."""
    explanation = (
        "idle, after, peak: MB of a device's processes together, RSS/PSS, before the first order, "
        "after the last, and at most; server: at most"
    )
    lines = [explanation]
    for figure in figures:
        if figure.failed:
            lines.append(f"{figure.name} left out: {figure.failed}")
        elif figure.note:
            lines.append(f"{figure.name}: {figure.note}")
    return "\n".join(lines)


def _megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def _memory(weights: Weights | None) -> tuple[str, str, str, str]:
    if weights is None:
        return ("-",) * 4
    devices = (_worst(part) for part in (weights.fresh, weights.after, weights.peak))
    fresh, after, peak = map(_both, devices)
    return fresh, after, peak, _both(weights.server)


def _worst(devices: Sequence[Memory]) -> Memory:
    return max(devices, key=lambda memory: memory.rss)


def _both(memory: Memory) -> str:
    return f"{memory.rss / 1e6:.0f}/{memory.pss / 1e6:.0f}"
