"""The results of the settings: a table on the terminal, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from benchmarks.leak.sending import RELEASES


def table(figures: Sequence[Mapping[str, Any]]) -> Table:
    """A table with one row for each setting."""
    shown = Table(box=None)
    for title in ("setting", "bytes", "PSNR, dB", "SSIM", "accuracy, %", "epsilon",
                  f"of {RELEASES}"):  # fmt: skip
        shown.add_column(title, justify="left" if title == "setting" else "right", no_wrap=True)
    for figure in figures:
        bounds = (figure["epsilon"], figure["epsilon_of_releases"])
        shown.add_row(
            figure["name"],
            f"{figure['bytes']:,.0f}",
            f"{figure['psnr']:.1f}",
            f"{figure['ssim']:.3f}",
            f"{100 * figure['accuracy']:.1f}",
            *("none" if bound is None else f"{bound:,.3g}" for bound in bounds),
        )
    return shown


def draw(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Draw the images: a row for each setting, a column for each victim, the originals first."""
    from matplotlib.figure import Figure

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(columns + 1.2, len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=110)
