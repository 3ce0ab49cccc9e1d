"""Measures what each choice of the compiler and of the agent's session is worth.

    python -m benchmarks.choices --model resnet8 --batch 32 --threads 1

The whole step, as it is compiled and run, races the same step without one of its parts, each in a
separate process, in turns (`race`). The speed of a variant is its images/s divided by those of the
whole step in the same round; the table shows the median over the rounds. Its memory is the peak of
a bare process with the step. The whole step takes part twice; the difference of the two is noise.

Measured: see docs/benchmarks.md.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import command, race
from benchmarks.race import ContenderError, Entry
from benchmarks.train_step import contenders
from benchmarks.train_step.setting import Setting
from tools import worker
from wire.names import anchored

WHOLE, CONTROL = "as it is", "as it is, once more"


def _one_by_one(tensors: Any) -> Any:
    from tools.export.tracing.state import Part, Piece

    pieces: list[Piece] = []
    for name, tensor in tensors.trained.items():
        start = pieces[-1].start + pieces[-1].size if pieces else 0
        pieces.append(Piece(f"optim.piece{len(pieces)}", start, (Part(name, tensor.numel()),)))
    return tuple(pieces)


def _compared(_: Any, out: Any, grad: Any, result: Any, threshold: float) -> Any:
    return grad * (result > threshold).cast(out.dtype)


@contextlib.contextmanager
def _graph_without(part: str) -> Iterator[None]:
    """Within the block, the compiler leaves one of its parts out."""
    import torch

    from tools.export import compiler
    from tools.export.rules import RULES
    from tools.export.rules.layers import pointwise

    relu = torch.ops.aten.threshold_backward.default
    patches: dict[str, Any] = {
        "second moments": mock.patch.object(pointwise, "WIDER", 1 << 30),
        "flat optimizer": mock.patch.object(compiler, "pieces", _one_by_one),
        "one-pass masks": mock.patch.dict(RULES, {relu: _compared}),
    }
    with patches.get(part, contextlib.nullcontext()):
        yield


GRAPHS = ("second moments", "flat optimizer", "one-pass masks")
SESSIONS: dict[str, Callable[[Any, Any], object]] = {
    "onnxruntime's order": lambda ort, o: setattr(o, "execution_order", ort.ExecutionOrder.DEFAULT),
    "onnxruntime's fusions": lambda ort, o: setattr(
        o, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    ),
    "memory pattern": lambda _, o: setattr(o, "enable_mem_pattern", True),
    "planned reuse": lambda _, o: setattr(o, "enable_mem_reuse", True),
    "no arena": lambda _, o: setattr(o, "enable_cpu_mem_arena", False),
    "sleeping threads": lambda _, o: o.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    ),
}


def _changed(variant: str) -> None:
    """From here on, sessions differ in one setting from the agent's."""
    import onnxruntime as ort

    make, change = ort.InferenceSession, SESSIONS[variant]

    def session(path: Path, options: Any, **others: Any) -> Any:
        change(ort, options)
        return make(path, options, **others)

    mock.patch.object(ort, "InferenceSession", session).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 if the input is bad or the whole step fails."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["worker"]:
        return _worker(*words[1:])
    parser = command.parser("choices", __doc__)
    command.add_model(parser)
    parser.add_argument("--batch", type=command.count, default=32)
    parser.add_argument("--threads", type=command.count, default=1)
    parser.add_argument("--rounds", type=command.count, default=5)
    parser.add_argument("--seconds", type=command.seconds, default=1.0, help="length of a turn")
    return command.run(parser, words, _measure)


def _worker(variant: str, folder: str, threads: str) -> int:
    if variant in SESSIONS:
        _changed(variant)
    return worker.serve(lambda: contenders.stillhouse(Path(folder), int(threads)))


def _measure(options: argparse.Namespace) -> None:
    import models  # not above: a worker's memory is measured, and it does not need torch
    from benchmarks.train_step import network

    name = anchored(options.model, Path())
    shape = options.input or models.input_shape(name)
    task = network.default_task(name, shape)
    chosen = Setting(name, task, options.batch, shape)
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as scratch:
        folders = {}
        for name in (WHOLE, *GRAPHS):
            folder = folders[name] = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            chosen.write(folder)
            with _graph_without(name):
                network.export_step(chosen, folder)
        places = {
            name: folders.get(name, folders[WHOLE]) for name in (WHOLE, CONTROL, *GRAPHS, *SESSIONS)
        }
        entries = [
            Entry(name, ["benchmarks.choices", "worker", name, str(folder)])
            for name, folder in places.items()
        ]
        courses = race.run(
            entries, threads=options.threads, rounds=options.rounds, seconds=options.seconds,
            logs=Path(scratch), say=lambda _: None,
        )  # fmt: skip
    if courses[0].failed:
        raise ContenderError(f"the whole step fails, so nothing compares: {courses[0].failed}")
    print(f"{options.model}, batch {options.batch}, {options.threads} threads")
    print(f"{'':32}{'images/s':>10}{'x whole':>10}{'lowest - highest':>20}{'memory':>10}")
    whole = courses[0].turns
    for course in courses:
        prefix = {"": "", **dict.fromkeys(GRAPHS, "without "), **dict.fromkeys(SESSIONS, "with ")}
        name = prefix.get(course.entry.name, "") + course.entry.name
        if course.failed:
            print(f"{name:32} {course.failed}")
            continue
        ratios = [variant / base for variant, base in zip(course.turns, whole, strict=True)]
        print(
            f"{name:32}{statistics.median(course.turns):10.1f}{statistics.median(ratios):10.2f}"
            f"{min(ratios):11.2f} - {max(ratios):.2f}  {course.peak_bytes / 1e6:8.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main())
