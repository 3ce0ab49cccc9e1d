"""What a round of FedAvg costs beyond training: Stillhouse against Flower, process for process.

    python -m benchmarks.round_overhead --devices 4 --rounds 10 --turns 3 --json round.json

The server sends the 1,663,370 float32 values of `caldas_cnn` (6.65 MB) to each device. Devices
train nothing, and return as many values at once. The server averages them. Nothing is compressed.

    mosquitto   Stillhouse over a Mosquitto that it starts
    tls         the same with mutual TLS
    embedded    Stillhouse over the embedded broker, pure Python, meant for demonstrations
    flower      flwr 1.41.0 in its recommended form: a SuperLink and SuperNodes, FedAvg with its
                message API, without evaluation; from PyPI, in a separate environment

Agents, orchestrator, broker, SuperLink and SuperNodes are separate processes on one machine, over
loopback; only `tls` uses TLS. Stillhouse journals and syncs to disk as always; Flower keeps its
state in memory, which is its default. Contenders take turns, each from a fresh start, in an order
that changes; only one runs at a time.

    s a round     from the end of one round to the end of the next, including the server's work;
                  median of all rounds but the first of each turn
    of Flower's   a turn's median divided by Flower's in the same turn; the median over the turns
    up, down      MQTT payloads of a round, for all devices together
    memory        from /proc, in separate turns that are not timed, for the device whose processes
                  take most: RSS and, since processes share libraries, PSS

Measured: see docs/benchmarks.md.
"""

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from rich.console import Console

from benchmarks import command
from benchmarks.race import ContenderError
from benchmarks.round_overhead import flower, report
from benchmarks.round_overhead.fleet import Fleet
from benchmarks.round_overhead.report import FLOWER, Course
from benchmarks.round_overhead.turn import VALUES, Contender, Plan
from orchestrator import broker
from wire.errors import BrokerError

ALL = ("mosquitto", "tls", "embedded", FLOWER)
WEIGHED_ROUNDS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 if the input is bad or Stillhouse itself fails."""
    parser = command.parser("round_overhead", __doc__)
    parser.add_argument("--devices", type=command.count, default=4)
    parser.add_argument(
        "--rounds", type=command.count, default=10, help="in a turn, after a first one"
    )
    parser.add_argument("--turns", type=command.count, default=3)
    parser.add_argument("--without", action="append", default=[], choices=ALL, metavar="NAME",
                        help=f"leave one out: {', '.join(ALL)}")  # fmt: skip
    command.add_cache(parser)
    command.add_json(parser)
    return command.run(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    where = command.machine()
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as scratch:
        contenders, courses = _entries(options, Path(scratch))
        if any(name != FLOWER for name in contenders):
            command.say("compiling the artifact")
            (Path(scratch) / "first").mkdir()
            Fleet("embedded", Path(scratch) / "artifact")(Plan(1, 1), Path(scratch) / "first")
        _run(contenders, courses, options, Path(scratch))
    figures = report.summarize(courses)
    console = Console(width=None if sys.stdout.isatty() else 140)
    print(report.head(where, options.devices, options.rounds, options.turns))
    console.print(report.table(figures))
    print(report.notes(figures))
    whole = {
        "benchmark": "round_overhead",
        "machine": {**where, **{n: metadata.version(n) for n in ("paho-mqtt", "amqtt")}},
        "devices": options.devices,
        "values": VALUES,
        "rounds": options.rounds,
        "turns": options.turns,
        "requirements": {FLOWER: flower.REQUIREMENTS},
        "contenders": [asdict(figure) for figure in figures],
    }
    command.write(options.json, whole)


def _entries(
    options: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Contender], list[Course]]:
    """The contenders, and a course for each, even if it cannot take part."""
    contenders: dict[str, Contender] = {}
    courses = [Course(name) for name in ALL if name not in options.without]
    for course in courses:
        if course.name == FLOWER:
            command.say("flower: getting its environment ready")
            with _leaving(course):
                programs = flower.environment(options.cache.resolve())
                contenders[FLOWER] = flower.Flower(programs)
        elif course.name != "embedded" and broker.find() is None:
            course.failed = "no such program; sudo apt install mosquitto"
        else:
            kind: broker.Kind = "embedded" if course.name == "embedded" else "mosquitto"
            tls = course.name == "tls"
            contenders[course.name] = Fleet(kind, scratch / "artifact", tls=tls)
    return contenders, courses


def _run(
    contenders: dict[str, Contender], courses: Sequence[Course], options: argparse.Namespace,
    scratch: Path,
) -> None:  # fmt: skip
    """Let all take turns. If Flower fails, it is left out; if ours fails, the benchmark ends."""
    running = [course for course in courses if course.name in contenders]
    timed = Plan(options.devices, options.rounds)
    weighed = Plan(options.devices, min(options.rounds, WEIGHED_ROUNDS), weighed=True)
    for number, plan in enumerate((weighed, *[timed] * options.turns)):
        for course in random.Random(number).sample(running, len(running)):
            if course.failed:
                continue
            what = "weighed" if plan.weighed else f"turn {number} of {options.turns}"
            command.say(f"{course.name}: {what}")
            with tempfile.TemporaryDirectory(dir=scratch) as folder, _leaving(course):
                turn = contenders[course.name](plan, Path(folder))
                if plan.weighed:
                    course.weights = turn.weights
                else:
                    course.turns.append(turn)


@contextlib.contextmanager
def _leaving(course: Course) -> Iterator[None]:
    """Within the block, a failure of Flower is recorded; a failure of ours ends the benchmark."""
    try:
        yield
    except (ContenderError, BrokerError) as fault:
        if course.name != FLOWER:
            raise ContenderError(f"{course.name}: {fault}") from fault
        course.failed = str(fault)


if __name__ == "__main__":
    sys.exit(main())
