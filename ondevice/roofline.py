"""The roofline (Williams, Waterman, Patterson 2009): what limits each layer, and how near it came.

    intensity      FLOPs / bytes moved
    roof           min(peak, intensity x bandwidth), GFLOP/s
    of roof        the shortest time that the machine allows, divided by the measured time:
                   max(FLOPs / peak, bytes / bandwidth) / seconds

The peak is measured with numpy's matrix product, the bandwidth with a copy. Bytes are what nodes
read and write, so a layer whose data stay in a cache may be over 100 %.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wire.costs import PHASES
from wire.errors import SettingsError
from wire.measurement import LayerTime, Machine, Measurement

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

SHOWN, LABELLED = 12, 8
LEAST = 0.005  # share of the step's time; a layer that takes less is not drawn
COLOURS = {"forward": "#0072b2", "backward": "#d55e00", "update": "#009e73"}
MARKERS = {"forward": "o", "backward": "s", "update": "^"}
INK, PALE = "#333333", "#9a9a9a"


class Point(NamedTuple):
    """One layer and phase under the roof; `intensity` is 0 if it multiplies nothing."""

    label: str
    phase: str
    intensity: float
    gflops: float
    seconds: float


def of_roof(row: LayerTime, machine: Machine) -> float:
    """The share of its roof that a layer reached; see the module's docstring."""
    least = max(row.flops / machine.gemm_gflops, row.bytes / machine.copy_gbytes) / 1e9
    return least / row.seconds if row.seconds else 0.0


def longest(layers: Iterable[LayerTime], number: int = SHOWN) -> list[LayerTime]:
    """The layers and phases that take the most time, slowest first."""
    return sorted(layers, key=lambda row: -row.seconds)[:number]


def sums(layers: Iterable[LayerTime]) -> Iterator[LayerTime]:
    """Each phase summed over its layers."""
    for phase in PHASES:
        rows = [row for row in layers if row.phase == phase]
        keys = ("flops", "bytes", "activation_bytes", "seconds")
        yield LayerTime(phase, phase, *(sum(getattr(row, key) for row in rows) for key in keys))


def table(report: Measurement) -> list[str]:
    """Lines for the terminal: the longest layers under the roof."""
    machine = report.machine
    head = f"{'layer':24} {'phase':9} {'ms':>7} {'MFLOP':>7} {'MB':>7} {'FLOP/B':>7} "
    lines = [f"{head}{'GFLOP/s':>8} {'roof':>6} {'of roof':>8}  bound by"]
    for row in longest(report.layers):
        point = _point(row)
        roof = min(machine.gemm_gflops, point.intensity * machine.copy_gbytes)
        bound = "arithmetic" if roof == machine.gemm_gflops else "memory"
        rates = f"{point.intensity:7.2f} {point.gflops:8.1f} {roof:6.1f}"
        none = f"{'-':>7} {'-':>8} {'-':>6}"
        lines.append(
            f"{row.name or '(model)':24.24} {row.phase:9} {1e3 * row.seconds:7.2f} "
            f"{row.flops / 1e6:7.1f} {row.bytes / 1e6:7.1f} "
            f"{rates if row.flops else none} {100 * of_roof(row, machine):6.0f} %  {bound}"
        )
    return lines


def check(path: Path) -> None:
    """Return if a picture can be drawn to a file of this name.

    Raises:
        SettingsError: matplotlib is missing, or the name does not end in .png.
    """
    if path.suffix != ".png":
        raise SettingsError(f"--roofline {path}: expected a name that ends in .png")
    if util.find_spec("matplotlib") is None:
        raise SettingsError(
            "--roofline: matplotlib is not installed here; the terminal shows the same numbers, or "
            "write --json and draw elsewhere: orchestrator measure-report"
        )


def draw(path: Path, report: Measurement) -> None:
    """Draw the picture of one device: its roof, and every layer and phase that multiplies."""
    figure, axes = canvas()
    points = [_point(row) for row in longest(report.layers, len(report.layers))]
    whole = sum(point.seconds for point in points)
    shown = [p for p in points if p.intensity and p.gflops and p.seconds >= LEAST * whole]
    if not shown:
        raise SettingsError("--roofline: no layer of this artifact was timed and multiplies")
    _frame(axes, [report.machine], shown)
    _roof(axes, report.machine, INK)
    for phase in PHASES:
        dots = [point for point in shown if point.phase == phase]
        axes.scatter(
            [p.intensity for p in dots], [p.gflops for p in dots],
            s=[24 + 1200 * p.seconds / whole for p in dots], color=COLOURS[phase],
            marker=MARKERS[phase], alpha=0.8, linewidths=0.6, edgecolors="white", zorder=3,
        )  # fmt: skip
        axes.scatter([], [], s=50, color=COLOURS[phase], marker=MARKERS[phase], label=phase)
    legend = axes.legend(loc="lower right", frameon=False, title="area: share of the step")
    hidden = sum(point.seconds for point in points if not point.intensity)
    artifact, platform = report.artifact, report.platform
    axes.set_title(
        f"{label(artifact.model.name, 30)}, batch {artifact.batch}, on {label(platform.model, 40)} "
        f"({label(platform.machine, 10)}, {report.threads or 'all'} threads)\n"
        f"not shown: layers that multiply nothing, {100 * hidden / whole:.0f} % of the time, and "
        f"those that take under {100 * LEAST:g} %",
        loc="left", fontsize=10, color=INK,
    )  # fmt: skip
    figure.canvas.draw()  # only this settles the layout
    bounds = _name_roof(axes, report.machine)
    _label(axes, shown[:LABELLED], shown, [legend, *bounds])
    figure.savefig(path)


def draw_fleet(path: Path, reports: Mapping[str, Measurement]) -> None:
    """Draw the picture of several devices: each one's roof, and its phases summed over layers."""
    import matplotlib as mpl

    figure, axes = canvas()
    phases = {
        name: [p for p in map(_point, sums(report.layers)) if p.intensity and p.gflops]
        for name, report in reports.items()
    }
    everything = list(itertools.chain.from_iterable(phases.values()))
    _frame(axes, [report.machine for report in reports.values()], everything)
    colours = mpl.colormaps["viridis"]
    for number, (name, points) in enumerate(phases.items()):
        colour = colours(0.9 * number / max(len(phases) - 1, 1))
        _roof(axes, reports[name].machine, colour)
        for point in points:
            axes.scatter(
                point.intensity, point.gflops, s=60, color=[colour], marker=MARKERS[point.phase],
                edgecolors="white", linewidths=0.6, zorder=3,
            )  # fmt: skip
        axes.plot([], [], color=colour, label=label(name, 24))
    for phase in PHASES:
        axes.scatter([], [], s=50, color=PALE, marker=MARKERS[phase], label=phase)
    axes.legend(loc="lower right", frameon=False, fontsize=8, ncols=1 + len(phases) // 16)
    figure.savefig(path)


def canvas(height: float = 6.0) -> tuple["Figure", "Axes"]:
    """An empty picture; `height` is in inches, and all our pictures have the same width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, height), layout="constrained", dpi=144)
    FigureCanvasAgg(figure)  # this canvas can measure texts
    return figure, figure.subplots()


def label(text: str, most: int, otherwise: str = "?") -> str:
    """A text from elsewhere, made safe for matplotlib: one line, literal, and not too long.

    Args:
        text: may hold `$` and backslashes; they are not read as a formula.
        most: characters; a longer text loses its middle.
        otherwise: the label if the font has none of the text's characters.
    """
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    line = " ".join(text.split())
    shown = "".join(c for c in line if c.isprintable() and ord(c) in known).strip() or otherwise
    if len(shown) > most:  # names often differ at their ends
        begin = 2 * most // 3
        shown = f"{shown[:begin]}\N{HORIZONTAL ELLIPSIS}{shown[len(shown) - most + begin + 1 :]}"
    # A legend leaves out labels that begin with an underscore.
    return ("\N{ZERO WIDTH SPACE}" if shown[0] == "_" else "") + shown.replace("$", r"\$")


def _point(row: LayerTime) -> Point:
    intensity = row.flops / row.bytes if row.bytes else 0.0
    gflops = row.flops / row.seconds / 1e9 if row.seconds else 0.0
    return Point(row.name or "(model)", row.phase, intensity, gflops, row.seconds)


def _frame(axes: "Axes", machines: Sequence[Machine], points: Sequence[Point]) -> None:
    """Make the axes logarithmic, and wide enough for the points and the knees of all roofs."""
    from matplotlib.ticker import LogLocator, NullFormatter

    knees = [machine.gemm_gflops / machine.copy_gbytes for machine in machines]
    across = [*knees, *(point.intensity for point in points)]
    up = [point.gflops for point in points] + [machine.gemm_gflops for machine in machines]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(across) / 2, 4 * max(across))
    axes.set_ylim(min(up) / 2, 2 * max(up))
    axes.set_xlabel("arithmetic intensity, FLOP/byte")
    axes.set_ylabel("GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _roof(axes: "Axes", machine: Machine, colour: Any) -> None:
    knee = machine.gemm_gflops / machine.copy_gbytes
    left, right = axes.get_xlim()
    slope = [left * machine.copy_gbytes, machine.gemm_gflops]
    axes.plot([left, knee], slope, color=colour, linewidth=1.6, zorder=2)
    axes.plot([knee, right], [machine.gemm_gflops] * 2, color=colour, linewidth=1.6, zorder=2)


def _name_roof(axes: "Axes", machine: Machine) -> list["Annotation"]:
    """Write both bounds along their lines; the layout must be settled."""
    right, peak, copy = axes.get_xlim()[1], machine.gemm_gflops, machine.copy_gbytes
    low = max(axes.get_xlim()[0], axes.get_ylim()[0] / copy) * 1.2
    (x0, y0), (x1, y1) = axes.transData.transform([(low, low * copy), (2 * low, 2 * low * copy)])
    flat = axes.annotate(
        f"{peak:.1f} GFLOP/s, matrix product", (right, peak), (-2, 4), color=INK,
        textcoords="offset points", ha="right", fontsize=9,
    )  # fmt: skip
    steep = axes.annotate(
        f"{copy:.1f} GB/s, copy", (low, low * copy), (-3, 5), color=INK, fontsize=9,
        textcoords="offset points", rotation_mode="anchor",
        rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
    )  # fmt: skip
    return [flat, steep]


def _label(
    axes: "Axes", chosen: Sequence[Point], points: Sequence[Point], others: Sequence["Artist"]
) -> None:
    """Write the names of points, each at the nearest free place.

    Args:
        axes: with a settled layout.
        chosen: the points to name; earlier ones choose their places first.
        points: all points that are drawn.
        others: other things that names must not cover.
    """
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]  # Agg has one
    spots = axes.transData.transform([(p.intensity, p.gflops) for p in points])
    marks = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in spots]
    for line in axes.lines:
        ends = axes.transData.transform(line.get_xydata())
        along = np.linspace(ends[0], ends[-1], 60)
        marks += [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3) for x, y in along]
    taken = [other.get_window_extent(renderer) for other in others]
    frame = axes.get_window_extent(renderer)
    places = [
        (reach * math.cos(math.radians(angle)), reach * math.sin(math.radians(angle)))
        for reach in range(12, 180, 8)
        for angle in (0, 180, 30, -30, 150, -150, 60, -60, 120, -120)
    ]
    for point in chosen:
        words = f"{label(point.label, 40)} {point.phase}, {1e3 * point.seconds:.1f} ms"
        at = (point.intensity, point.gflops)
        text = axes.annotate(words, at, places[0], textcoords="offset points", fontsize=8,
                             va="center")  # fmt: skip
        for place in places:
            text.set_position(place)
            text.set_horizontalalignment("left" if place[0] > 0 else "right")
            text.update_positions(renderer)
            box = text.get_window_extent(renderer).padded(2)
            inside = frame.x0 < box.x0 < box.x1 < frame.x1 and frame.y0 < box.y0 < box.y1 < frame.y1
            if inside and not box.count_overlaps([*taken, *marks]):
                break
        text.remove()
        side = "left" if place[0] > 0 else "right"
        axes.annotate(
            words, at, place, textcoords="offset points", fontsize=8, va="center", ha=side,
            color=INK, zorder=4,
            arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.7, "shrinkA": 1,
                        "shrinkB": 3, "relpos": (float(side == "right"), 0.5)},
        )  # fmt: skip
        taken.append(box)
