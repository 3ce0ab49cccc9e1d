"""Whether what was written for a GPU works on this one: each run on the GPU beside one on the CPU.

    python -m benchmarks.gpu_check

Takes about five minutes. Each line is a small run of the real orchestrator with simulated devices
on handwritten digits, once on the CPU in float32 and once on the GPU in the way that the line
names. A run agrees if losses and accuracies do. The last part is `benchmarks.distill`: server
training beside a loop that works as the published code does.

    resident samples    quantized feature maps lie in the GPU's memory and are decoded there
    bfloat16            convolutions and matrix products by autocast
    compiled            torch.compile; needs Triton and a C++ compiler
    muon                `fastcnn6-32` with Muon, slow averages and cropped maps
    stack               all devices of a round train as one stacked model
    ranks               two GPUs or more: `torchrun` with one process each

Exit code 1 if a run disagrees or fails, 2 if there is no GPU. `--device cpu` tries the check
itself.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, runs
from orchestrator.config import RunConfig
from orchestrator.simulation import simulate
from wire import records
from wire.errors import SettingsError, StillhouseError

DEVICES, SAMPLES, ROUNDS = 4, 64, 2
TRANSFER = {"extractor": "shared", "freeze_after": 0, "views": True}
RESNET = {"model": "resnet10", "epochs": 2, "batch": 32}
FAST = {
    "model": "fastcnn6-32", "epochs": 2, "batch": 32, "optimizer": "muon", "lr": 0.05,
    "schedule": "linear", "averaging": True, "alpha": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """A run on the GPU, which is compared with the same run on the CPU.

    Attributes:
        name: as in the module's docstring.
        strategy, model: of both runs; the model is the devices'.
        server: settings of `[server]` in both runs.
        change: further ones on the GPU.
        stack: devices trained at once on the GPU; see `simulate.run`.
        within: largest relative difference of losses, and largest difference of accuracies.
    """

    name: str
    strategy: str = "fedgkt"
    model: str = "resnet8"
    server: Mapping[str, Any] = field(default_factory=lambda: RESNET)
    change: Mapping[str, Any] = field(default_factory=dict)
    stack: int = 0
    within: float = 0.05


CHECKS = (
    Check("resident samples"),
    Check("bfloat16", change={"precision": "bfloat16"}, within=0.15),
    Check("compiled", change={"compile": True}),
    Check("muon", model="resnet8-opponent", server=FAST, within=0.15),
    Check("stack", strategy="fedavg", server={}, stack=DEVICES),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check; return 0, 1 if something disagrees or fails, or 2 if there is no GPU."""
    parser = command.parser("gpu_check", __doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=[check.name for check in CHECKS], help="one check alone")
    failed: list[str] = []
    code = command.run(parser, arguments, lambda options: failed.extend(_measure(options)))
    return code or int(bool(failed))


def _measure(options: argparse.Namespace) -> list[str]:
    """Print a line for each check; returns the names of those that failed."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "PyTorch finds no GPU here; install a build of torch for CUDA, and see nvidia-smi"
        )
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, to try the check"
    print(f"{gpu}; torch {torch.__version__}", flush=True)
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        images = Path(folder) / "images"
        runs.deal(images, "digits", devices=DEVICES, seed=0, per_device=SAMPLES)
        chosen = [check for check in CHECKS if options.only in (None, check.name)]
        failed += [check.name for check in chosen if not _agrees(check, options.device, images)]
    if options.only:
        return failed
    line = [sys.executable, "-m", "benchmarks.distill", "--device", options.device]
    if options.device == "cpu":
        line += ["--model", "resnet10", "--images", "64", "--rounds", "1", "--without-compiled"]
    if subprocess.run(line, check=False).returncode:
        failed.append("speed")
    if torch.cuda.device_count() > 1:
        print("ranks: torchrun --nproc-per-node 2 -m orchestrator.main start --config run.toml")
    return failed


def _agrees(check: Check, device: str, images: Path) -> bool:
    """Run on the CPU and on the GPU, compare, and print a line."""
    try:
        plain = _run(check, "cpu", images)
        there = _run(replace(check, server={**check.server, **check.change}), device, images)
    except (StillhouseError, RuntimeError) as fault:  # PyTorch's errors on a GPU are of this kind
        print(f"{check.name}: FAILED: {fault}", flush=True)
        return False
    worst = 0.0
    for key in ("server_loss", "server_accuracy", "device_accuracy"):
        if key in plain:
            size = abs(plain[key]) if key == "server_loss" else 1.0
            worst = max(worst, abs(there[key] - plain[key]) / size)
    agrees = worst <= check.within
    print(
        f"{check.name}: {'agrees' if agrees else 'DISAGREES'}; largest difference {worst:.3g}, "
        f"allowed {check.within:g}",
        flush=True,
    )
    return agrees


def _run(check: Check, device: str, images: Path) -> dict[str, Any]:
    """The metrics of the last round of a run with the settings of `check`."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        table = {
            "name": "check",
            "runs": folder,
            "rounds": ROUNDS,
            "heldout": str(images / "heldout.npz"),
            "strategy": check.strategy,
            "cohort": {"min_devices": DEVICES},
            "device": {"model": check.model, "lr": 0.05, "batch": 16},
            "server": {"torch_device": device, "precision": "float32", **check.server},
            "transfer": TRANSFER if check.strategy == "fedgkt" else {},
        }
        config = records.build(RunConfig, table, where=check.name, error=SettingsError)
        stack = check.stack if device != "cpu" else 0
        return dict(simulate.run(config, images, stack=stack).entries[-1])


if __name__ == "__main__":
    sys.exit(main())
