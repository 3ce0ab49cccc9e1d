"""Compile a model's training step into an artifact that the edge agent trains with.

python -m tools.export --model resnet8 --classes 10 --batch 32 --out DIR
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import models
from tools.export import Adam, Optimizer, Sgd, export
from tools.export.graphs.cost import table
from tools.export.plan import describe
from wire import __version__, stopping, storage
from wire.artifact import Artifact
from wire.errors import ExportError, StillhouseError
from wire.names import cut, title

_PROGRAM = "python -m tools.export"


def main(arguments: Sequence[str] | None = None, program: str = _PROGRAM) -> int:
    """Export a model; returns 0 if the artifact is written, 2 if the input or the disk is bad."""
    return stopping.run(lambda: _main(arguments, program))


def _main(arguments: Sequence[str] | None, program: str) -> int:
    options = _parser(program).parse_args(arguments)
    try:
        with storage.at(options.out):
            artifact = _export(options)
    except StillhouseError as fault:
        print(f"export: {fault}", file=sys.stderr)
        return 2
    manifest = artifact.manifest
    train = manifest.graphs["train"]
    print(f"{artifact.folder}: {artifact.digest}")
    print(f"{train.flops / manifest.micro_batch / 1e6:.1f} MFLOPs a sample and step")
    print(f"training takes {describe(manifest.memory, manifest.batch, manifest.micro_batches)}")
    if options.costs:
        print(table(train.layers, manifest.micro_batch))
    return 0


def _export(options: argparse.Namespace) -> Artifact:
    torch.manual_seed(options.seed)
    name = cut(options.model, options.split)
    shape = models.input_shape(name) if options.input is None else options.input
    module = models.build(name, classes=options.classes, input_shape=shape)
    if options.keep_rate != 1:
        parts = models.layout(module, shape)
        module = models.narrow(module, parts, options.keep_rate)
    return export(
        module,
        name=title(name),
        classes=options.classes,
        input_shape=shape,
        batch=options.batch,
        out=options.out,
        task=options.task,
        optimizer=_optimizer(options),
        mean=options.mean,
        std=options.std,
        keep_rate=options.keep_rate,
        micro_batches=options.micro_batches,
        memory_mb=options.memory_mb,
        proximal=options.proximal,
    )


def _parser(program: str = _PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__.replace(_PROGRAM, program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tools.export {__version__}")
    parser.add_argument(
        "--model",
        required=True,
        help="a known name, path/to/file.py:factory, or package.module:factory",
    )
    parser.add_argument("--split", default="",
                        help="path of the module whose output is the feature map, like "
                        "features.3 (FedGKT)")  # fmt: skip
    parser.add_argument("--classes", type=int, required=True, help="number of logits")
    parser.add_argument("--batch", type=int, required=True, help="samples a step, fixed")
    parser.add_argument("--micro-batches", type=int, default=1,
                        help="parts of a batch that are run one by one, to save memory; "
                        "batch norm then sees one part at a time")  # fmt: skip
    parser.add_argument("--memory-mb", type=_megabytes,
                        help="most for the agent's process in training, 10^6 bytes; to fit, "
                        "activations are computed again, and if that is not enough the batch is "
                        "split into micro-batches; batch norm then sees one part at a "
                        "time")  # fmt: skip
    parser.add_argument("--keep-rate", type=float, default=1.0,
                        help="of a sub-model: the share of each hidden layer's units that it "
                        "has")  # fmt: skip
    parser.add_argument("--proximal", action="store_true", help="FedProx's term, weighed by mu")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--task", choices=["distill", "classify"], default="distill",
                        help="distill takes a teacher's logits beside labels")  # fmt: skip
    parser.add_argument("--input", type=_ints, help="shape of a sample, like 3,32,32")
    parser.add_argument("--mean", type=_floats, help="by channel, on the 0..1 scale; default 0.5")
    parser.add_argument("--std", type=_floats, help="likewise; default 0.25")
    parser.add_argument("--optimizer", choices=["sgd", "adam"], default="sgd",
                        help="compiled into the step")  # fmt: skip
    parser.add_argument("--momentum", type=float, default=0.9, help="of sgd")
    parser.add_argument("--nesterov", action=argparse.BooleanOptionalAction, default=None,
                        help="of sgd; default: with momentum")  # fmt: skip
    parser.add_argument("--beta1", type=float, default=0.9, help="of adam")
    parser.add_argument("--beta2", type=float, default=0.999, help="of adam")
    parser.add_argument("--eps", type=float, default=1e-8, help="of adam")
    parser.add_argument("--weight-decay", type=float, help="default: sgd 0.0005, adam 0")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--costs", action="store_true", help="print what each layer costs")
    return parser


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 3,32,32, got {text!r}") from None


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers like 0.5,0.5,0.5, got {text!r}"
        ) from None


def _megabytes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected megabytes over 0, like 250, got {text!r}")
    return value


def _optimizer(options: argparse.Namespace) -> Optimizer:
    decay = options.weight_decay
    try:
        if options.optimizer == "adam":
            return Adam(options.beta1, options.beta2, options.eps, 0.0 if decay is None else decay)
        nesterov = options.momentum > 0 if options.nesterov is None else options.nesterov
        return Sgd(options.momentum, nesterov, 0.0005 if decay is None else decay)
    except ValueError as fault:
        raise ExportError(str(fault)) from fault


if __name__ == "__main__":
    sys.exit(main())
