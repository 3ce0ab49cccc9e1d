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
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from benchmarks import command
from benchmarks.codec import contenders, report, samples, turns
from benchmarks.codec.contenders import Contender


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 0, or 2 where the input is bad."""
    parser = command.parser("codec", __doc__)
    parser.add_argument("--data", default="digits", help="a data set, or the path of an .npz")
    parser.add_argument("--steps", type=command.count, default=200, help="of training")
    parser.add_argument("--values", type=command.count, default=1_663_370, help="in a vector")
    parser.add_argument("--rounds", type=command.count, default=5)
    parser.add_argument("--seconds", type=command.seconds, default=0.2, help="of a turn")
    command.add_json(parser)
    return command.run(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    machine = command.machine()
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
    whole = {
        "benchmark": "codec",
        "machine": machine,
        "options": {name: str(value) for name, value in vars(options).items()},
        "sizes": {k: {n: asdict(s) for n, s in of.items()} for k, of in size.items()},
        "rates": {n: {d: asdict(r) for d, r in of.items()} for n, of in rate.items()},
        "peer_bits": bits,
        "kashin_to_hadamard_at_equal_bytes": finding,
    }
    command.write(options.json, whole)


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
