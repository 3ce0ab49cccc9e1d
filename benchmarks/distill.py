"""Server training of FedGKT: images a second, beside a loop that works like the reference code.

    python -m benchmarks.distill --model resnet55 --batch 64 --json distill.json

    stillhouse             `orchestrator.training` as a run calls it: all devices' samples in one
                           shuffled order, quantized until a batch is drawn, channels last
    stillhouse, bfloat16   the same with `server.precision = "bfloat16"` (the default on CUDA)
    stillhouse, compiled   the same with bfloat16 and `server.compile = true`
    reference              device by device and batch by batch, from float32 arrays in memory; each
                           is moved to the processor when it is needed; NCHW, float32; the loss is
                           read in every step

Feature maps come from an untrained `resnet8` extractor on real images. All contenders start from
the same weights and take turns in one process; the order changes from round to round.

    train        images a second of training steps (forward, loss, backward, optimizer)
    teach        images a second of teacher logits, in evaluation mode
    x reference  images a second divided by the reference's in the same round; the median over the
                 rounds
    of peak      images/s x FLOPs of a training step on an image (2 x multiply-adds, as PyTorch's
                 FlopCounterMode counts them), as a share of the best matrix product in that
                 precision that PyTorch reached here in any round
    of memory    images/s x bytes of a training step on an image, as a share of the best copy; each
                 layer's output counts as written once and read four times (by the next layer, and
                 with its gradient in the backward pass)

Measured: see docs/benchmarks.md.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks import command
from orchestrator import datasets
from orchestrator.config import ServerConfig
from orchestrator.training import distill, optimizers, shards
from orchestrator.training.samples import Samples, Source
from wire import codecs, tensors

REFERENCE, OURS = "reference", "stillhouse"
PASSES = 5  # over each layer's output: one write, one read, and three in the backward pass
SIDE = 4096  # side of the matrices that measure the peak on a GPU; 1024 on a CPU


@dataclass
class Contender:
    """A contender; `train` and `teach` each do one pass and return its number of images."""

    name: str
    precision: torch.dtype
    train: Callable[[], int]
    teach: Callable[[], int]
    rates: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "teach": []})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0, or 2 if the input is bad."""
    parser = command.parser("distill", __doc__)
    parser.add_argument("--model", default="resnet55",
                        help="resnet10, resnet19, resnet55, resnet109, or your own: "
                        "nets.py:large")  # fmt: skip
    parser.add_argument("--batch", type=command.count, default=64)
    parser.add_argument("--devices", type=command.count, default=16)
    parser.add_argument(
        "--images", type=command.count, default=1024, help="of all devices together"
    )
    parser.add_argument("--features", default="relu|q=4|zstd", help="codec of the feature maps")
    parser.add_argument("--data", default="digits", help="a data set, or the path of an .npz")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=command.count, help="for PyTorch; default: its own choice"
    )
    parser.add_argument("--rounds", type=command.count, default=5)
    parser.add_argument("--without-compiled", action="store_true", help="leave torch.compile out")
    command.add_json(parser)
    return command.run(parser, arguments, _measure)


def _measure(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    codecs.parse(options.features)
    models.input_shape(options.model)  # raises if there is no such network
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if options.device == "auto" else options.device)
    machine = command.machine()
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as scratch:
        opened = _shards(options, Path(scratch))
        channels, height, width = opened[0].features.shape[1:]
        shape = (channels, height, width)
        contenders = _contenders(options, opened, device, shape)
        peaks = {c.precision: 0.0 for c in contenders}
        copies: list[float] = []
        for contender in contenders:  # not timed: makes tables, kernels and compiled code
            contender.train(), contender.teach()
        for number in range(options.rounds):
            for contender in random.Random(number).sample(contenders, len(contenders)):
                for what, work in (("train", contender.train), ("teach", contender.teach)):
                    contender.rates[what].append(_rate(work, device))
            for precision, best in peaks.items():
                peaks[precision] = max(best, _product(precision, device))
            copies.append(_copy(device))
    flops, values = _costs(options, shape)
    figures = []
    for contender in contenders:
        figure = _figure(contender, contenders[0])
        rate, precision = figure["train"]["median"], contender.precision
        figure["of_peak"] = rate * flops / peaks[precision]
        figure["of_memory"] = rate * values * PASSES * precision.itemsize / max(copies)
        figures.append(figure)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(
        f"{options.model}, batch {options.batch}, {options.images} images of {options.devices} "
        f"devices as {options.features}: {flops / 1e6:.0f} MFLOPs an image and step; rounds: "
        f"{options.rounds}\n{gpu or machine['cpu']}, {machine['cores']} cores, load "
        f"{machine['load']} at the start, {torch.get_num_threads()} threads; torch "
        f"{machine['torch']}",
        highlight=False,
    )
    console.print(_table(figures))
    whole = {"benchmark": "distill", "machine": {**machine, "gpu": gpu}, "figures": figures}
    settings = {name: str(value) for name, value in vars(options).items()}
    command.write(options.json, {**whole, "options": settings})


def _shards(options: argparse.Namespace, folder: Path) -> list[shards.Shard]:
    """The shards that a run would make of what `options.devices` devices send."""
    images, _ = datasets.read(options.data, seed=0)
    colour, classes = images.resized((32, 32), 3), max(2, len(images.classes))
    torch.manual_seed(0)
    net: Any = models.build("resnet8", classes=classes).eval()
    numbers = np.arange(options.images) % len(colour.y)
    opened = []
    for i, chosen in enumerate(np.array_split(numbers, options.devices)):
        packed = []
        for at in np.split(chosen, range(32, len(chosen), 32)):
            x = torch.from_numpy(colour.x[at]).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                maps, logits = (part.numpy() for part in net.extract(x))
            record = [
                ("features", np.ascontiguousarray(maps), options.features),
                ("logits", logits, "float32"),
                ("labels", colour.y[at].astype(np.uint16), "raw"),
            ]
            packed.append(tensors.pack(record, seed=i))
        path = folder / f"payload-{i}"
        path.write_bytes(b"".join(packed))
        sizes = {"samples": len(chosen), "shape": maps.shape[1:], "classes": classes}
        opened.append(shards.shelve(path, folder / f"shard-{i}", **sizes))
    return opened


def _contenders(
    options: argparse.Namespace,
    opened: list[shards.Shard],
    device: torch.device,
    shape: tuple[int, int, int],
) -> list[Contender]:
    """All contenders, the reference first."""
    classes = opened[0].logits.shape[1]
    plain = ServerConfig(model=options.model, epochs=1, batch=options.batch, precision="float32")
    torch.manual_seed(1)
    start = models.build(options.model, classes=classes, input_shape=shape).state_dict()

    def model() -> nn.Module:
        network = models.build(options.model, classes=classes, input_shape=shape)
        network.load_state_dict(start)
        return network.to(device)

    samples = Samples([*map(Source, opened)], device)
    contenders = [_reference(plain, opened, model(), device)]
    low = replace(plain, precision="bfloat16")
    contenders.append(_ours(OURS, plain, samples, model()))
    contenders.append(_ours(f"{OURS}, bfloat16", low, samples, model()))
    if not options.without_compiled:
        contenders.append(_ours(f"{OURS}, compiled", replace(low, compile=True), samples, model()))
    return contenders


def _ours(name: str, config: ServerConfig, samples: Samples, model: nn.Module) -> Contender:
    step = optimizers.make_optimizer(model, config)
    whole = range(len(samples))

    def train() -> int:
        distill.train(model, step, samples, config, seed=0, progress=lambda *_: None)
        return len(samples)

    def teach() -> int:
        return len(distill.teach(model, samples, whole, config))

    device = next(model.parameters()).device
    return Contender(name, distill.precision(config, device), train, teach)


def _reference(
    config: ServerConfig, opened: list[shards.Shard], model: nn.Module, device: torch.device
) -> Contender:
    """The reference: batches of float32 arrays device by device, as in the published code."""
    batches = []
    for shard in opened:
        drawn = Samples([Source(shard)], torch.device("cpu"))
        for at in np.split(np.arange(len(shard)), range(config.batch, len(shard), config.batch)):
            one = drawn.draw(at)
            batches.append([np.ascontiguousarray(part.numpy()) for part in one[:3]])
    step = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    total = sum(len(shard) for shard in opened)

    def train() -> int:
        model.train()
        for arrays in batches:
            x, teacher, y = (torch.from_numpy(array).to(device) for array in arrays)
            out = model(x)
            t = config.temperature
            soft = F.kl_div(
                F.log_softmax(out / t, 1), F.softmax(teacher / t, 1), reduction="batchmean"
            )
            loss = t * t * soft + config.alpha * F.cross_entropy(out, y)
            step.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            step.step()
            loss.item()
        return total

    @torch.no_grad()
    def teach() -> int:
        model.eval()
        logits = [model(torch.from_numpy(b[0]).to(device)).cpu().numpy() for b in batches]
        return sum(map(len, logits))

    return Contender(REFERENCE, torch.float32, train, teach)


def _rate(work: Callable[[], int], device: torch.device) -> float:
    began = time.perf_counter()
    images = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - began)


def _product(precision: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a matrix product, the best of several."""
    side = SIDE if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=precision)
    return 2 * side**3 * max(_rate(lambda: len([a @ a]), device) for _ in range(5))


def _copy(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy; the best of several."""
    a = torch.empty(1 << 28 if device.type == "cuda" else 1 << 26, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes * max(_rate(lambda: len([b.copy_(a)]), device) for _ in range(3))


def _costs(options: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[float, float]:
    """FLOPs of a training step, and number of values in all layers' outputs, for one image."""
    model = models.build(options.model, classes=10, input_shape=shape).train()
    values = 0

    def count(_module: nn.Module, _inputs: object, out: torch.Tensor) -> None:
        nonlocal values
        values += out.numel()

    for layer in model.modules():
        if not list(layer.children()):
            layer.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, *shape)).sum().backward()
    return counter.get_total_flops() / 2, values / 2


def _figure(one: Contender, reference: Contender) -> dict[str, Any]:
    figure: dict[str, Any] = {"name": one.name, "precision": str(one.precision).split(".")[1]}
    for what, rates in one.rates.items():
        ratios = [a / b for a, b in zip(rates, reference.rates[what], strict=True)]
        figure[what] = {
            "median": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "to_reference": statistics.median(ratios),
        }
    return figure


def _table(figures: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for title in ("", "train, images/s", "x reference", "teach, images/s", "x reference",
                  "of peak", "of memory"):  # fmt: skip
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for figure in figures:
        cells = []
        for what in ("train", "teach"):
            of = figure[what]
            cells.append(f"{of['median']:.0f} ({of['lowest']:.0f} - {of['highest']:.0f})")
            cells.append(f"{of['to_reference']:.2f}")
        shares = (f"{100 * figure[key]:.0f} %" for key in ("of_peak", "of_memory"))
        table.add_row(figure["name"], *cells, *shares)
    return table


if __name__ == "__main__":
    sys.exit(main())
