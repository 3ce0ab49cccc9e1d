"""Codecs of payloads: bits a value, errors, and values a second on one thread, beside peers.

    python -m benchmarks.codec --json codec.json

    bits         bits a value of the bytes that are sent; "update" counts the whole frame of a
                 model, with its matrices by the codec and its vectors as float32
    error        squared error divided by squared norm (vNMSE), for standard normal values, for
                 log-normal values with random signs, and for a real update: the change of
                 `caldas_cnn` in the last half of its training steps
    M/s          million values a second, for normal values, or for feature maps behind `resnet8`'s
                 extractor; median of the rounds (lowest - highest)
    x pytorch    values a second divided by those of PyTorch's butterfly Hadamard transform with the
                 same four-bit quantizer, in the same direction and round; the median of the rounds

Contenders take turns; the order changes from round to round. Kashin's representation is also
compared with Hadamard's at the same number of bytes. The networks train on scikit-learn's digits
unless --data names a data set or an `.npz` of images.

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
    """Measure; return 0, or 2 if the input is bad."""
    parser = command.parser("codec", __doc__)
    parser.add_argument("--data", default="digits", help="a data set, or the path of an .npz")
    parser.add_argument("--steps", type=command.count, default=200, help="of each training")
    parser.add_argument("--values", type=command.count, default=1_663_370, help="in a vector")
    parser.add_argument("--rounds", type=command.count, default=5)
    parser.add_argument("--seconds", type=command.seconds, default=0.2, help="length of a turn")
    command.add_json(parser)
    return command.run(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    machine = command.machine()
    sampled = samples.make(options.data, values=options.values, steps=options.steps)
    size = report.sizes(sampled)
    entries = _entries(sampled)
    rate = report.rates(turns.run(entries, rounds=options.rounds, seconds=options.seconds))
    bits = {entry.name: _bits(entry) for entry in contenders.peers(sampled.normal)}
    kashin = {kind: report.kashin(size[kind]) for kind in ("normal", "lognormal", "update")}
    console = Console(width=None if sys.stdout.isatty() else 165)
    console.print(report.head(machine, vars(options), sampled), highlight=False)
    for table in (
        report.updates_table(size, rate),
        report.features_table(size["features"], rate),
        report.peers_table(rate, bits),
    ):
        console.print(table)
    for kind, ratios in kashin.items():
        line = ", ".join(f"{ratio:.2f} at q={q}" for q, ratio in ratios.items())
        console.print(f"kashin's error over hadamard's at equal bytes, {kind}: {line}")
    whole = {
        "benchmark": "codec",
        "machine": machine,
        "options": {name: str(value) for name, value in vars(options).items()},
        "sizes": {k: {n: asdict(s) for n, s in of.items()} for k, of in size.items()},
        "rates": {n: {d: asdict(r) for d, r in of.items()} for n, of in rate.items()},
        "peer_bits": bits,
        "kashin_to_hadamard_at_equal_bytes": kashin,
    }
    command.write(options.json, whole)


def _entries(sampled: samples.Samples) -> list[Contender]:
    maps = sampled.maps.reshape(-1)
    on_maps = [contenders.ours(spec, maps) for spec in contenders.FEATURES]
    return [
        *(contenders.ours(spec, sampled.normal) for spec in contenders.UPDATES),
        *(Contender(f"maps: {c.name}", c.encode, c.decode, c.values) for c in on_maps),
        *contenders.peers(sampled.normal),
    ]


def _bits(entry: Contender) -> float:
    """Bits per value of a peer's encoding: bytes, an array, or PyTorch's groups of tensors."""
    sent = entry.encode()
    if isinstance(sent, list):
        size = sum(tensor.nbytes for group in sent for tensor in group)
    else:
        size = memoryview(sent).nbytes
    return float(8 * size / entry.values)


if __name__ == "__main__":
    sys.exit(main())
