"""Codecs of payloads: bits a value, errors, and values a second on one thread, beside peers.

    python -m benchmarks.codec --json codec.json

    bits         of the bytes that are sent, a value; "update": of the whole frame of a model, its
                 matrices by the codec, its vectors as float32
    error        squared error over squared norm (vNMSE), of standard normal values, of log-normal
                 ones with random signs, and of a real update: what `caldas_cnn` changes by in the
                 last half of its training steps
    M/s          million values a second, normal ones, or feature maps behind `resnet8`'s extractor;
                 median of the rounds (lowest - highest)
    x pytorch    values a second over those of PyTorch's butterfly Hadamard transform with the same
                 four-bit quantizer, the same direction and round; the median of that

Contenders take turns, each round in another order. Kashin's representation is set against
Hadamard's at the same bytes as well. The networks train on scikit-learn's digits unless --data
names a data set or an `.npz` of images.

Measured: see docs/benchmarks.md.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.codec import contenders, report, samples, turns
from benchmarks.codec.contenders import Contender
from benchmarks.train_step.report import machine as describe
from wire.errors import SettingsError, StillhouseError


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0, or 2 where the input is bad."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codec",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="digits", help="a data set, or the path of an .npz")
    parser.add_argument("--steps", type=_count, default=200, help="of training, each network")
    parser.add_argument("--values", type=_count, default=1_663_370, help="in a vector")
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--seconds", type=_seconds, default=0.2, help="of a turn")
    parser.add_argument("--json", type=Path, help="file to write everything to")
    try:
        _measure(parser.parse_args(arguments))
    except StillhouseError as fault:
        print(f"codec: {fault}", file=sys.stderr)
        return 2
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError(f"expected over 0 to 600, got {text!r}")
    return value


def _measure(options: argparse.Namespace) -> None:
    if options.json and not options.json.parent.is_dir():
        raise SettingsError(f"--json {options.json}: {options.json.parent} is no folder; make it")
    machine = describe()
    given = samples.make(options.data, values=options.values, steps=options.steps)
    size = report.sizes(given)
    entries = _entries(given)
    rate = report.rates(turns.run(entries, rounds=options.rounds, seconds=options.seconds))
    bits = {entry.name: _bits(entry) for entry in contenders.peers(given.normal)}
    finding = {kind: report.kashin(size[kind]) for kind in ("normal", "lognormal", "update")}
    console = Console(width=None if sys.stdout.isatty() else 165)
    console.print(report.head(machine, vars(options), given), highlight=False)
    for table in (
        report.updates_table(size, rate),
        report.features_table(size["features"], rate),
        report.peers_table(rate, bits),
    ):
        console.print(table)
    for kind, ratios in finding.items():
        line = ", ".join(f"{ratio:.2f} at q={q}" for q, ratio in ratios.items())
        console.print(f"kashin's error over hadamard's at equal bytes, {kind}: {line}")
    if options.json:
        whole = {
            "benchmark": "codec",
            "machine": machine,
            "options": {name: str(value) for name, value in vars(options).items()},
            "sizes": {k: {n: asdict(s) for n, s in of.items()} for k, of in size.items()},
            "rates": {n: {d: asdict(r) for d, r in of.items()} for n, of in rate.items()},
            "peer_bits": bits,
            "kashin_to_hadamard_at_equal_bytes": finding,
        }
        options.json.write_text(json.dumps(whole, indent=1) + "\n")


def _entries(given: samples.Samples) -> list[Contender]:
    maps = given.maps.reshape(-1)
    behind = [contenders.ours(spec, maps) for spec in contenders.FEATURES]
    return [
        *(contenders.ours(spec, given.normal) for spec in contenders.UPDATES),
        *(Contender(f"maps: {c.name}", c.encode, c.decode, c.values) for c in behind),
        *contenders.peers(given.normal),
    ]


def _bits(entry: Contender) -> float:
    """What a peer's encoding takes, a value: bytes, an array, or PyTorch's groups of tensors."""
    sent = entry.encode()
    if isinstance(sent, list):
        size = sum(tensor.nbytes for group in sent for tensor in group)
    else:
        size = memoryview(sent).nbytes
    return float(8 * size / entry.values)


if __name__ == "__main__":
    sys.exit(main())
