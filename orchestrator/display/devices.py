"""Shows what is known of a fleet's devices: as a table, Markdown, JSON, and pictures."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ondevice import roofline
from orchestrator.display.view import short
from orchestrator.display.words import size
from orchestrator.fleet.devices import Device
from wire import records
from wire.errors import RunError
from wire.measurement import Measurement

COLUMNS = ("device", "model", "cores", "memory", "version", "last birth", "measured", "images/s",
           "peak memory", "J/sample")  # fmt: skip
COSTS = COLUMNS[-4:]
CUT = (0, 1)  # columns whose texts may be cut to fit


def cells(device: Device) -> tuple[str, ...]:
    """A device's row under `COLUMNS`; a dash stands for an unknown value."""
    platform, report = device.platform, device.measured
    joules = report.energy.joules_per_sample if report else None
    at = time.strftime("%Y-%m-%d %H:%M", time.gmtime(device.born_at)) if device.born_at else "-"
    slowed = " (held back)" if report and not report.valid else ""
    return (
        device.name,
        platform.model if platform else "-",
        str(platform.cores) if platform else "-",
        size(platform.memory_bytes) if platform else "-",
        device.birth.version if device.birth else "-",
        at,
        report.measured_at[:16].replace("T", " ") if report else "-",
        f"{report.step.images_per_s:.0f}{slowed}" if report else "-",
        size(report.memory.train_peak_bytes) if report else "-",
        "-" if joules is None else f"{joules:.3g}",
    )


def table(devices: Sequence[Device], width: int) -> Group:
    """The devices as one table for a terminal of so many columns, or as two if one is too wide."""
    rows = [cells(device) for device in devices]
    widest = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    whole = tuple(range(len(COLUMNS)))
    if sum(widest) + 2 * len(widest) <= width:
        return Group(_columns(rows, whole, width))
    machine = tuple(i for i in whole if COLUMNS[i] not in COSTS)
    costs = tuple(i for i in whole if COLUMNS[i] in ("device", *COSTS))
    measured = [row for row, device in zip(rows, devices, strict=True) if device.measured]
    parts = [_columns(rows, machine, width)]
    return Group(*parts, *([Text(), _columns(measured, costs, width)] if measured else ()))


def _columns(rows: Sequence[tuple[str, ...]], chosen: Sequence[int], width: int) -> Table:
    """A table of some of `COLUMNS`; names and models are cut if the terminal is too narrow."""
    widths = {i: max(len(row[i]) for row in [COLUMNS, *rows]) for i in chosen}
    room = width - 2 * (len(chosen) - 1) - sum(widths[i] for i in chosen if i not in CUT)
    if sum(widths[i] for i in CUT if i in widths) > room:
        name = max(room // 2, room - widths[1]) if 1 in widths else room
        widths[0] = min(widths[0], max(name, 8))
        if 1 in widths:
            widths[1] = min(widths[1], max(room - widths[0], 8))
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i in chosen:
        justify: Literal["left", "right"] = "left" if i in CUT else "right"
        shown.add_column(
            COLUMNS[i], justify=justify, no_wrap=True, overflow="ellipsis", width=widths[i]
        )
    for row in rows:
        shown.add_row(*(Text(row[i] if i else short(row[0], widths[0])) for i in chosen))
    return shown


def plain(devices: Sequence[Device]) -> list[dict[str, Any]]:
    """The devices for scripts, as JSON values; None for what is unknown, times in UTC."""
    return [
        {
            "device": device.name,
            "born_at": _utc(device.born_at) if device.born_at else None,
            "birth": records.plain(device.birth) if device.birth else None,
            "measured": records.plain(device.measured) if device.measured else None,
        }
        for device in devices
    ]


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def markdown(devices: Sequence[Device]) -> str:
    """The devices as a Markdown table; times are UTC."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(cells, devices)]
    return "".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |\n" for row in rows
    )


def write_report(devices: Sequence[Device], title: str, out: Path) -> list[Path]:
    """Write devices.md and its pictures into a folder; return the files.

    Raises:
        RunError: no device was measured.
    """
    measured = {d.name: d.measured for d in devices if d.measured}
    if not measured:
        raise RunError(
            "no device of this fleet was measured yet; on a device, while a run goes on: "
            "edge-agent measure --submit"
        )
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"speed": _draw_speed, "memory": _draw_memory, "roofline": roofline.draw_fleet}
    text = [f"# {title}\n", markdown(devices)]
    for name, draw in pictures.items():
        draw(out / f"{name}.png", measured)
        text.append(f"![{name}]({name}.png)\n")
    artifacts = "; ".join(sorted({_what(report) for report in measured.values()}))
    text.append(
        f"Measured: {artifacts}. Images a second are those of the median step. Memory is the peak "
        "of training (VmHWM), beside what the exporter foretold.\n"
    )
    (out / "devices.md").write_text("\n".join(text))
    return [out / "devices.md", *(out / f"{name}.png" for name in pictures)]


def _what(report: Measurement) -> str:
    """The artifact that was measured, in words."""
    artifact = report.artifact
    what = f"{artifact.model.name}, {artifact.task}, batch {artifact.batch}"
    return f"{what} (artifact {artifact.digest[:12]})"


def _draw_speed(path: Path, measured: Mapping[str, Measurement]) -> None:
    """Draw bars of images a second, with the quartiles of the step times."""
    figure, axes = roofline.canvas(1.4 + 0.4 * len(measured))
    names = sorted(measured, key=lambda name: measured[name].step.images_per_s)
    for row, name in enumerate(names):
        report = measured[name]
        speed = report.step.images_per_s
        low, _, high = (report.artifact.batch / s for s in reversed(report.step.quartiles_s))
        axes.barh(row, speed, height=0.6, color="#0072b2")
        axes.plot([low, high], [row, row], color=roofline.INK, linewidth=2)
        axes.annotate(f"{speed:,.0f}", (max(speed, high), row), (5, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    _finish(axes, names, "images a second; the line spans the quartiles")
    figure.savefig(path)


def _draw_memory(path: Path, measured: Mapping[str, Measurement]) -> None:
    """Draw bars of the peak memory in training, with the forecast."""
    figure, axes = roofline.canvas(1.4 + 0.4 * len(measured))
    names = sorted(measured, reverse=True)
    for row, name in enumerate(names):
        memory = measured[name].memory
        axes.barh(row, memory.train_peak_bytes / 1e6, height=0.6, color="#0072b2",
                  label="peak of training" if not row else None)  # fmt: skip
        axes.plot([memory.foretold_bytes / 1e6] * 2, [row - 0.4, row + 0.4], color="#d55e00",
                  linewidth=3, label="foretold" if not row else None)  # fmt: skip
        most = max(memory.train_peak_bytes, memory.foretold_bytes)
        axes.annotate(f"{memory.train_peak_bytes / 1e6:,.0f}", (most / 1e6, row), (6, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    _finish(axes, names, "MB")
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)


def _finish(axes: Any, names: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(names)), [roofline.label(name, 24) for name in names])
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.set_xlabel(unit)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
