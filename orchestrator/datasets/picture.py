"""Draws a split: one stacked horizontal bar of class counts for each device."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ondevice.roofline import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#22303c", "#687785", "#e3e8ec"
# Neighbours differ in hue and lightness, so that a bar can be read in grey print too.
PALETTE = (
    "#264653", "#2a9d8f", "#8ab17d", "#e9c46a", "#f4a261",
    "#e76f51", "#b5446e", "#6d597a", "#5b8fb9", "#a9b4c2",
)  # fmt: skip
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue
WIDTH = 8.6  # inches, like all lengths here
LEFT, RIGHT, TOP, BOTTOM = 0.95, 2.05, 0.98, 0.62


def draw(counts: NDArray[np.int64], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Draw `counts` (K devices, C classes) as a PNG at `path`, device 0 on top."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    devices, total = len(counts), counts.sum(axis=1)
    bar = min(0.5, max(0.42, 2.2 / devices), 8.0 / devices)
    tall = max(bar * devices, 0.21 * min(len(classes), len(PALETTE)))
    height = TOP + tall + BOTTOM
    colours = _colours(len(classes))
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(WIDTH, height), facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, tall / height)
        )
        start = np.zeros(devices)
        seam = 0.7 if len(classes) <= len(PALETTE) and devices <= 40 else 0.0
        for number, colour in enumerate(colours):
            bars = axes.barh(
                np.arange(devices),
                counts[:, number],
                0.76,
                left=start,
                color=colour,
                edgecolor="white",
                linewidth=seam,
            )
            if seam:
                axes.bar_label(
                    bars,
                    [str(n) if n >= 0.045 * total.max() else "" for n in counts[:, number]],
                    label_type="center",
                    fontsize=7.5,
                    color=INK if np.dot(colour, LUMINANCE) > 0.5 else "white",
                )
            start += counts[:, number]
        _frame(axes, total, step=1 if bar > 0.15 else 10)
        _legend(figure, axes, classes, colours)
        left = LEFT / WIDTH
        figure.text(
            left, 1 - 0.36 / height, label(title, 60), fontsize=12.5, fontweight="bold", va="center"
        )
        figure.text(
            left,
            1 - 0.63 / height,
            f"{total.sum():,} training samples in {len(classes)} classes, {span(total)} a device",
            color=MUTED,
            va="center",
        )
        figure.savefig(path, dpi=160, metadata={"Software": None})


def _colours(classes: int) -> list[tuple[float, float, float]]:
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    if classes <= len(PALETTE):
        return [to_rgb(colour) for colour in PALETTE[:classes]]
    ramp = LinearSegmentedColormap.from_list("stillhouse", list(PALETTE[:-1]))
    return [to_rgb(ramp(c / (classes - 1))) for c in range(classes)]


def _frame(axes: "Axes", total: NDArray[np.int64], step: int) -> None:
    """Draw axes, labels and the sum at the end of each bar; name every `step`-th device."""
    from matplotlib.ticker import MaxNLocator

    devices = len(total)
    named = range(0, devices, step)
    axes.set_ylim(devices - 0.5, -0.5)
    axes.set_xlim(0, int(total.max()) * 1.1)
    axes.set_yticks(named, [f"device {k}" for k in named])
    axes.set_xlabel("samples", color=MUTED, loc="left")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(length=0, labelcolor=INK)
    axes.tick_params(axis="x", labelcolor=MUTED)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    for k in named if step == 1 else ():
        axes.annotate(
            f"{total[k]:,}",
            (total[k], k),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=MUTED,
        )


def _legend(
    figure: "Figure",
    axes: "Axes",
    classes: tuple[str, ...],
    colours: list[tuple[float, float, float]],
) -> None:
    """Draw the class names beside the bars, or a scale of some names if they do not fit."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    if len(classes) <= len(PALETTE):
        patches = [Patch(color=colour) for colour in colours]
        axes.legend(
            patches,
            [label(name, 18, f"class {c}") for c, name in enumerate(classes)],
            loc="upper left",
            bbox_to_anchor=(1.03, 1.03),
            frameon=False,
            handlelength=0.9,
            handleheight=0.9,
            labelspacing=0.42,
        )
        return
    box = axes.get_position()
    scale = figure.add_axes((box.x1 + 0.35 / WIDTH, box.y0, 0.16 / WIDTH, box.height))
    scale.imshow(
        np.arange(len(classes))[:, None],
        aspect="auto",
        cmap=ListedColormap(colours),
        interpolation="nearest",
    )
    marks = np.linspace(0, len(classes) - 1, 6).round().astype(int)
    scale.set_xticks([])
    scale.set_yticks(marks, [label(classes[c], 18, f"class {c}") for c in marks])
    scale.yaxis.tick_right()
    scale.tick_params(length=0, labelsize=8, labelcolor=INK)
    scale.spines[:].set_visible(False)


def span(numbers: Iterable[int]) -> str:
    """The least and the greatest of some numbers, for people; one number if they are the same."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
