"""Turns what contenders did into figures for people and programs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.race import Course
from benchmarks.train_step.setting import Setting
from wire.names import title

GEMM, STILLHOUSE = "gemm", "stillhouse"
EAGER = ("pytorch", "pytorch-channels-last")


@dataclass(frozen=True)
class Figure:
    """A contender's figures; if it failed, the reason and zeros.

    Attributes:
        name: the contender's name.
        note: how its step differs from the others'.
        failed: why it has no figures, or "".
        images_per_s: one for each round.
        median, lowest, highest: of `images_per_s`.
        to_stillhouse, to_eager: images/s divided by Stillhouse's, and by the better eager layout's
            (None if no eager one took part); medians over the rounds.
        gemm_share: share of the machine's peak, 0 to 1.
        peak_bytes: peak of resident memory.
        first_loss: the loss before any update.
    """

    name: str
    note: str = ""
    failed: str = ""
    images_per_s: tuple[float, ...] = ()
    median: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0
    to_stillhouse: float | None = None
    to_eager: float | None = None
    gemm_share: float = 0.0
    peak_bytes: int = 0
    first_loss: float | None = None


@dataclass(frozen=True)
class Run:
    """All figures for one number of threads; `gemm_flops_per_s` has one value for each round."""

    threads: int
    gemm_flops_per_s: tuple[float, ...]
    contenders: tuple[Figure, ...]
    agent_peak_bytes: int


def summarize(threads: int, courses: Sequence[Course], agent: Course, flops: float) -> Run:
    """The figures of a race; `flops` counts a step on one image."""
    by_name = {course.entry.name: course for course in courses}
    gemm = by_name.pop(GEMM)
    eager = [by_name[name] for name in EAGER if name in by_name and not by_name[name].failed]
    best = max(eager, key=lambda course: statistics.median(course.turns), default=None)
    figures = tuple(
        _figure(course, by_name[STILLHOUSE], best, flops / max(gemm.turns))
        for course in by_name.values()
    )
    return Run(threads, tuple(gemm.turns), figures, agent.peak_bytes)


def _figure(course: Course, ours: Course, eager: Course | None, cost: float) -> Figure:
    name, note = course.entry.name, course.entry.note
    if course.failed:
        return Figure(name, note, course.failed)
    median = statistics.median(course.turns)
    return Figure(
        name,
        note,
        images_per_s=tuple(course.turns),
        median=median,
        lowest=min(course.turns),
        highest=max(course.turns),
        to_stillhouse=_ratio(course, ours),
        to_eager=None if eager is None else _ratio(course, eager),
        gemm_share=median * cost,
        peak_bytes=course.peak_bytes,
        first_loss=course.loss,
    )


def _ratio(course: Course, other: Course) -> float:
    return statistics.median(a / b for a, b in zip(course.turns, other.turns, strict=True))


def head(
    machine: Mapping[str, object], chosen: Setting, flops: float, *, rounds: int, seconds: float
) -> str:
    """What was measured, and where."""
    return (
        f"{title(chosen.model)}, {chosen.task}, batch {chosen.batch}: {flops / 1e6:.1f} MFLOPs an "
        f"image and step; rounds: {rounds}, {seconds:g} s each\n"
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']} at the start; Python "
        f"{machine['python']}, torch {machine['torch']}, onnxruntime {machine['onnxruntime']}"
    )


def table(run: Run) -> str:
    """The figures as text, one line a contender."""
    threads = f"{run.threads} thread" + ("s" if run.threads > 1 else "")
    titles = f"{'':<22}{'images/s':>9}{'lowest - highest':>19}{'x stillhouse':>14}{'x eager':>9}"
    lines = [
        f"{threads}, peak {max(run.gemm_flops_per_s) / 1e9:.1f} GFLOP/s",
        f"{titles}{'of peak':>9}{'memory':>10}",
    ]
    notes = []
    for figure in run.contenders:
        if figure.failed:
            lines.append(f"{figure.name:<22}   left out: {figure.failed}")
            continue
        lines.append(
            f"{figure.name:<22}{figure.median:>9.1f}"
            f"{f'{figure.lowest:.1f} - {figure.highest:.1f}':>19}"
            f"{_times(figure.to_stillhouse):>14}{_times(figure.to_eager):>9}"
            f"{100 * figure.gemm_share:>7.1f} %{figure.peak_bytes / 1e6:>7.0f} MB"
        )
        if figure.note:
            notes.append(f"{figure.name}: {figure.note}")
    lines.append(f"{'agent (whole process)':<82}{run.agent_peak_bytes / 1e6:>7.0f} MB")
    return "\n".join(lines + notes)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"
