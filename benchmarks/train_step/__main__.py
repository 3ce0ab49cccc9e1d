"""One training step of a device's network: Stillhouse against PyTorch and onnxruntime-training.

    python -m benchmarks.train_step --model resnet8 --batch 32 --threads 1,2 --json step.json

    stillhouse               the compiled step under plain ONNX Runtime, as the agent runs it
    pytorch                  eager, NCHW
    pytorch-channels-last    eager, NHWC
    pytorch-compile          torch.compile with inductor; needs a C++ compiler
    onnxruntime-training     1.19.2, the last version; plain SGD, since its package has no momentum

A step is the forward pass, the device's objective (cross entropy; for distillation plus
alpha * T^2 * KL to a teacher), the backward pass, and SGD with Nesterov momentum 0.9 and weight
decay 5e-4, on one batch in memory. All contenders start from the same weights; if the first loss
differs from Stillhouse's, a contender is not reported. Each is a process that takes turns with the
others (`race`).

    images/s       median over the rounds, lowest and highest
    x stillhouse   images/s divided by Stillhouse's in the same round; median over the rounds
    x eager        images/s divided by those of the better of PyTorch's two eager layouts, likewise
    of peak        images/s x FLOPs of a step on one image (2 x multiply-adds, as PyTorch's
                   FlopCounterMode counts them; one figure for all), as a share of the best float32
                   matrix product that PyTorch reached here in any round
    memory         peak resident memory of the process since its start (VmHWM)

"agent" is the memory of a whole edge agent, with images, blob store, journal and MQTT client, that
does an order's training; "stillhouse" is a bare process with the training step.

Measured: see docs/benchmarks.md.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import models
from benchmarks import command, race
from benchmarks.race import ContenderError, Course, Entry
from benchmarks.train_step import environment, network, report
from benchmarks.train_step.report import EAGER, GEMM, STILLHOUSE, Run
from benchmarks.train_step.setting import Setting, Task
from tools.worker import one_line
from wire.names import anchored

ORT_TRAINING = "onnxruntime-training"
COMPILE = "pytorch-compile"
PEERS = (*EAGER, COMPILE, ORT_TRAINING)
SAME_LOSS = 1e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 if the input is bad or Stillhouse itself fails."""
    parser = command.parser("train_step", __doc__)
    command.add_model(parser)
    parser.add_argument(
        "--task", choices=get_args(Task), help="default: distill if the network is split"
    )
    parser.add_argument("--batch", type=command.count, default=32)
    parser.add_argument("--threads", type=_counts, default=(1,), help="such as 1,2")
    parser.add_argument("--rounds", type=command.count, default=5)
    parser.add_argument("--seconds", type=command.seconds, default=1.0, help="length of a turn")
    parser.add_argument("--without", action="append", default=[], choices=PEERS, metavar="NAME",
                        help=f"leave a peer out: {', '.join(PEERS)}")  # fmt: skip
    command.add_cache(parser)
    command.add_json(parser)
    return command.run(parser, arguments, _measure)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(command.count(part) for part in text.split(","))


def _measure(options: argparse.Namespace) -> None:
    name = anchored(options.model, Path())
    shape = options.input or models.input_shape(name)
    task = options.task or network.default_task(name, shape)
    chosen = Setting(name, task, options.batch, shape)
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as scratch:
        folder = Path(scratch)
        machine = command.machine()
        chosen.write(folder)
        network.export_step(chosen, folder)
        flops = network.flops_per_image(chosen, folder)
        entries, missing = _entries(chosen, folder, options)
        head = report.head(machine, chosen, flops, rounds=options.rounds, seconds=options.seconds)
        print(head)
        for threads in options.threads:
            courses, agent = _run(threads, entries, folder, options)
            runs.append(report.summarize(threads, [*courses, *missing], agent, flops))
            print("\n" + report.table(runs[-1]), flush=True)
    whole = {
        "benchmark": "train_step",
        "machine": machine,
        "setting": asdict(chosen),
        "flops_per_image": flops,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "requirements": {ORT_TRAINING: environment.REQUIREMENTS},
        "runs": [asdict(run) for run in runs],
    }
    command.write(options.json, whole)


def _entries(
    chosen: Setting, folder: Path, options: argparse.Namespace
) -> tuple[list[Entry], list[Course]]:
    """The contenders, and a course for each one that cannot take part."""
    entries = [_ours(name, folder) for name in (GEMM, STILLHOUSE)]
    entries += [_ours(name, folder) for name in EAGER if name not in options.without]
    if COMPILE not in options.without:
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(options.cache.resolve() / "inductor")}
        entries.append(replace(_ours(COMPILE, folder), environment=cache))
    if ORT_TRAINING in options.without:
        return entries, []
    module = "benchmarks.train_step.ort_training"
    entry = Entry(
        ORT_TRAINING, [module, "train", str(folder)], "SGD without momentum and weight decay"
    )
    try:
        command.say(f"{ORT_TRAINING}: getting its environment ready in {options.cache}")
        python = environment.onnxruntime_training(options.cache.resolve())
        network.export_forward(chosen, folder)
        environment.call([str(python), "-m", module, "generate", str(folder)])
    except ContenderError as fault:
        return entries, [Course(entry, failed=str(fault))]
    except Exception as fault:  # noqa: BLE001 - torch.onnx may raise anything; it is reported
        return entries, [Course(entry, failed=one_line(fault))]
    return [*entries, replace(entry, python=str(python))], []


def _ours(name: str, folder: Path) -> Entry:
    return Entry(name, ["benchmarks.train_step.contenders", name, str(folder)])


def _run(
    threads: int, entries: Sequence[Entry], folder: Path, options: argparse.Namespace
) -> tuple[list[Course], Course]:
    """Run the race, and then the agent."""
    courses = race.run(
        entries, threads=threads, rounds=options.rounds, seconds=options.seconds, logs=folder,
        say=command.say,
    )  # fmt: skip
    (agent,) = race.run(
        [_ours("agent", folder)], threads=threads, rounds=1, seconds=0, logs=folder, say=command.say
    )
    for course in (*courses, agent):
        if course.failed and course.entry.name in (STILLHOUSE, GEMM, "agent"):
            raise ContenderError(f"{course.entry.name}: {course.failed}")
    ours = next(course.loss for course in courses if course.entry.name == STILLHOUSE)
    for course in courses:
        if ours and course.loss and abs(course.loss / ours - 1) > SAME_LOSS:
            course.failed = f"not the same step: first loss {course.loss:.6f}, ours {ours:.6f}"
    return courses, agent


if __name__ == "__main__":
    sys.exit(main())
