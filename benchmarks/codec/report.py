"""Figures of codecs, for people and for programs."""

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
    """What one codec makes of one kind of values: real bytes, real errors.

    Attributes:
        bits: of the encoded bytes, a value.
        error: squared error over squared norm (vNMSE).
    """

    bits: float
    error: float


@dataclass(frozen=True)
class Rate:
    """Values a second in one direction: median, lowest, highest of the rounds.

    Attributes:
        to_pytorch, to_copy: median over the rounds of the ratio to PyTorch's Hadamard transform
            with 4 bits, and to a copy of the values in memory, in the same direction.
    """

    median: float
    lowest: float
    highest: float
    to_pytorch: float
    to_copy: float


def vector(spec: str, values: Floats) -> Size:
    """A codec on a vector."""
    codec = codecs.parse(spec)
    body = codec.encode(values, seed=2, name=spec)
    decoded = codec.decode(body, len(values), seed=2, name=spec)
    return Size(8 * len(body) / len(values), _vnmse(values, decoded))


def update(spec: str, state: Mapping[str, Floats]) -> Size:
    """A codec on a model's tensors by the policy: matrices by `spec`, vectors as they are.

    The whole frame counts.
    """
    data = tensors.pack(tensors.weights(state, spec), seed=2)
    back = tensors.unpack(frames.decode(data, max_bytes=len(data)), where=spec)
    given = np.concatenate([array.reshape(-1) for array in state.values()])
    decoded = np.concatenate([back[name].reshape(-1) for name in state])
    return Size(8 * len(data) / len(given), _vnmse(given, decoded))


def _vnmse(given: Floats, decoded: Floats) -> float:
    exact = given.astype(np.float64)
    return float(np.square(decoded - exact).sum() / np.square(exact).sum())


def sizes(samples: Samples) -> dict[str, dict[str, Size]]:
    """By kind of values and codec."""
    return {
        "normal": {spec: vector(spec, samples.normal) for spec in contenders.UPDATES},
        "lognormal": {spec: vector(spec, samples.lognormal) for spec in contenders.UPDATES},
        "update": {spec: update(spec, samples.update) for spec in contenders.UPDATES},
        "features": {spec: vector(spec, samples.maps.reshape(-1)) for spec in contenders.FEATURES},
    }


def rates(courses: Sequence[Course]) -> dict[str, dict[str, Rate]]:
    """By contender and direction."""
    by_name = {course.name: course for course in courses}
    torch, copy = by_name[contenders.TORCH], by_name[contenders.COPY]
    return {
        course.name: {
            "encode": _rate(course.encode, torch.encode, copy.encode),
            "decode": _rate(course.decode, torch.decode, copy.decode),
        }
        for course in courses
    }


def _rate(own: Sequence[float], torch: Sequence[float], copy: Sequence[float]) -> Rate:
    return Rate(
        statistics.median(own),
        min(own),
        max(own),
        statistics.median(a / b for a, b in zip(own, torch, strict=True)),
        statistics.median(a / b for a, b in zip(own, copy, strict=True)),
    )


def kashin(of: Mapping[str, Size]) -> dict[int, float]:
    """Kashin's error over Hadamard's at the same bytes, for q = 1 to 4: below 1, Kashin is better.

    Kashin's bits a value lie between those of Hadamard at q and at q + 1 bits. As many bytes are
    spent where some blocks have q bits and the others q + 1, and their mean is Hadamard's error.
    """
    found = {}
    for q in range(1, 5):
        ours, coarse, fine = (
            of[spec] for spec in (f"kashin|q={q}", f"hadamard|q={q}", f"hadamard|q={q + 1}")
        )
        share = (ours.bits - coarse.bits) / (fine.bits - coarse.bits)
        found[q] = ours.error / (share * fine.error + (1 - share) * coarse.error)
    return found


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
    """Codecs of weights and updates."""
    table = _table("Weights and updates", "error: normal", "log-normal", "update", "bits, update")
    for spec in contenders.UPDATES:
        errors = [f"{size[kind][spec].error:.3g}" for kind in ("normal", "lognormal", "update")]
        table.add_row(
            spec, f"{size['normal'][spec].bits:.3f}", *errors, f"{size['update'][spec].bits:.3f}",
            *_speed(rate[spec]),
        )  # fmt: skip
    return table


def features_table(size: Mapping[str, Size], rate: Mapping[str, Any]) -> Table:
    """Codecs of feature maps."""
    table = _table("Feature maps behind a ReLU", "error")
    for spec in contenders.FEATURES:
        cells = (f"{size[spec].bits:.3f}", f"{size[spec].error:.3g}")
        table.add_row(spec, *cells, *_speed(rate[f"maps: {spec}"]))
    return table


def peers_table(rate: Mapping[str, Any], bits: Mapping[str, float]) -> Table:
    """The others."""
    table = _table("Peers")
    for name, own in bits.items():
        table.add_row(name, f"{own:.3f}", *_speed(rate[name]))
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
