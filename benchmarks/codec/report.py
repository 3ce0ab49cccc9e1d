"""Figures of the codecs, for people and for programs."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.codec import contenders
from benchmarks.codec.samples import Samples
from benchmarks.codec.turns import Course
from wire import codecs, frames, tensors

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Size:
    """Size and error of one codec on one kind of values, both measured.

    Attributes:
        bits: encoded bits per value.
        error: squared error divided by squared norm (vNMSE).
    """

    bits: float
    error: float


@dataclass(frozen=True)
class Rate:
    """Values per second in one direction: median, lowest and highest of the rounds.

    Attributes:
        to_pytorch, to_copy: rate divided by PyTorch's 4-bit Hadamard transform's in the same
            direction, and by a memory copy's; medians over the rounds.
    """

    median: float
    lowest: float
    highest: float
    to_pytorch: float
    to_copy: float


def vector(spec: str, values: Floats) -> Size:
    """The size and error of a codec on a vector."""
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=2, name=spec)
    decoded = codec.decode(body, len(values), seed=2, name=spec)
    return Size(8 * len(body) / len(values), _vnmse(values, decoded))


def update(spec: str, state: Mapping[str, Floats]) -> Size:
    """The size and error of a codec on a model's tensors: matrices by `spec`, vectors as they are.

    The size is that of the whole frame.
    """
    data = tensors.pack(tensors.weights(state, spec), seed=2)
    back = tensors.unpack(frames.decode(data, max_bytes=len(data)), where=spec)
    original = np.concatenate([array.reshape(-1) for array in state.values()])
    decoded = np.concatenate([back[name].reshape(-1) for name in state])
    return Size(8 * len(data) / len(original), _vnmse(original, decoded))


def _vnmse(original: Floats, decoded: Floats) -> float:
    exact = original.astype(np.float64)
    return float(np.square(decoded - exact).sum() / np.square(exact).sum())


def sizes(samples: Samples) -> dict[str, dict[str, Size]]:
    """The sizes by kind of values and codec."""
    return {
        "normal": {spec: vector(spec, samples.normal) for spec in contenders.UPDATES},
        "lognormal": {spec: vector(spec, samples.lognormal) for spec in contenders.UPDATES},
        "update": {spec: update(spec, samples.update) for spec in contenders.UPDATES},
        "features": {spec: vector(spec, samples.maps.reshape(-1)) for spec in contenders.FEATURES},
    }


def rates(courses: Sequence[Course]) -> dict[str, dict[str, Rate]]:
    """The rates by contender and direction."""
    by_name = {course.name: course for course in courses}
    torch, copy = by_name[contenders.TORCH], by_name[contenders.COPY]
    return {
        course.name: {
            "encode": _rate(course.encode, torch.encode, copy.encode),
            "decode": _rate(course.decode, torch.decode, copy.decode),
        }
        for course in courses
    }


def _rate(turns: Sequence[float], torch: Sequence[float], copy: Sequence[float]) -> Rate:
    return Rate(
        statistics.median(turns),
        min(turns),
        max(turns),
        statistics.median(a / b for a, b in zip(turns, torch, strict=True)),
        statistics.median(a / b for a, b in zip(turns, copy, strict=True)),
    )


def kashin(of: Mapping[str, Size]) -> dict[int, float]:
    """Kashin's error over Hadamard's at equal bytes, for q = 1 to 4; below 1 Kashin is better.

    Kashin takes more bits a value than Hadamard at q bits, and fewer than at q + 1. Hadamard would
    take as many bytes with some blocks at q bits and the others at q + 1; its error is their mean.
    """
    ratios = {}
    for q in range(1, 5):
        ours, coarse, fine = (
            of[spec] for spec in (f"kashin|q={q}", f"hadamard|q={q}", f"hadamard|q={q + 1}")
        )
        share = (ours.bits - coarse.bits) / (fine.bits - coarse.bits)
        ratios[q] = ours.error / (share * fine.error + (1 - share) * coarse.error)
    return ratios


def head(machine: Mapping[str, object], options: Mapping[str, Any], samples: Samples) -> str:
    """What was measured, and where."""
    parameters = sum(array.size for array in samples.update.values())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']} at the start; one "
        f"thread; Python {machine['python']}, numpy {machine['numpy']}, torch {machine['torch']}\n"
        f"{len(samples.normal):,} values a vector; {options['rounds']} rounds, "
        f"{options['seconds']:g} s a turn; update and feature maps: {options['steps']} steps on "
        f"{options['data']}, {parameters:,} parameters, {samples.maps.size:,} values of maps"
    )


def updates_table(size: Mapping[str, Mapping[str, Size]], rate: Mapping[str, Any]) -> Table:
    """The table of the codecs for weights and updates."""
    table = _table("Weights and updates", "error: normal", "log-normal", "update", "bits, update")
    for spec in contenders.UPDATES:
        errors = [f"{size[kind][spec].error:.3g}" for kind in ("normal", "lognormal", "update")]
        table.add_row(
            spec, f"{size['normal'][spec].bits:.3f}", *errors, f"{size['update'][spec].bits:.3f}",
            *_speed(rate[spec]),
        )  # fmt: skip
    return table


def features_table(size: Mapping[str, Size], rate: Mapping[str, Any]) -> Table:
    """The table of the codecs for feature maps."""
    table = _table("Feature maps behind a ReLU", "error")
    for spec in contenders.FEATURES:
        cells = (f"{size[spec].bits:.3f}", f"{size[spec].error:.3g}")
        table.add_row(spec, *cells, *_speed(rate[f"maps: {spec}"]))
    return table


def peers_table(rate: Mapping[str, Any], bits: Mapping[str, float]) -> Table:
    """The table of the peers."""
    table = _table("Peers")
    for name, peer_bits in bits.items():
        table.add_row(name, f"{peer_bits:.3f}", *_speed(rate[name]))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("codec", no_wrap=True)
    for name in ("bits", *columns, "encode M/s", "x pytorch", "decode M/s", "x pytorch"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _speed(rate: Mapping[str, Rate]) -> list[str]:
    cells = []
    for direction in ("encode", "decode"):
        median, low, high = (
            f"{value / 1e6:.{0 if value >= 1e8 else 1}f}"
            for value in (rate[direction].median, rate[direction].lowest, rate[direction].highest)
        )
        cells += [f"{median} ({low} - {high})", f"{rate[direction].to_pytorch:.2f}"]
    return cells
