"""The contenders that run in this environment, each in a process: `NAME FOLDER THREADS`.

All start from the same weights and batch, treat denormals as zero, and read the loss after every
step. Those of PyTorch use its fused SGD, the fastest that it has for a CPU. A contender imports
only what it needs, since its memory is measured.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.train_step import setting
from benchmarks.train_step.setting import (
    ALPHA,
    CLASSES,
    LR,
    MOMENTUM,
    SEED,
    TEMPERATURE,
    WEIGHT_DECAY,
)
from tools import worker
from tools.worker import Prepared

Variant = Literal["eager", "channels-last", "compile"]

GEMM_SIZES = (1024, 1536, 2048)


def stillhouse(folder: Path, threads: int) -> Prepared:
    """The artifact under plain ONNX Runtime, as the agent runs it."""
    from safetensors.numpy import load_file

    from ondevice.trainer import TrainStep
    from wire.artifact import open_artifact

    artifact = open_artifact(folder / "artifact")
    chosen = setting.load(folder)
    step = TrainStep(artifact, load_file(artifact.weights), threads=threads)
    values = chosen.load_batch(folder) | {"lr": LR, "alpha": ALPHA, "temperature": TEMPERATURE}
    for name, buffer in step.inputs.items():
        buffer[...] = values[name]

    def once() -> float:
        step()
        return float(step.loss)

    return worker.steps(once, chosen.batch)


def agent(folder: Path, threads: int) -> Prepared:
    """The agent as a device starts it, at work on an order, but without a broker.

    It has images, blob store and journal, augments batches, and packs the trained state to be sent.
    It extracts no features.
    """
    from edge_agent import main as _main  # noqa: F401 - what the command imports takes memory too
    from edge_agent.agent import Agent
    from ondevice.config import AgentConfig
    from ondevice.kept import KeptFile
    from ondevice.work import Desk, perform
    from wire import tensors
    from wire.address import BrokerAddress
    from wire.artifact import open_artifact
    from wire.messages import BlobRef, Order

    chosen, artifact = setting.load(folder), open_artifact(folder / "artifact")
    address = BrokerAddress("mqtt://localhost")  # never connected to: `run` is not called
    device = Agent(
        AgentConfig("device-0", "fleet", folder / "images.npz", folder / f"agent-{threads}",
                    address, image=chosen.input, threads=threads)
    )  # fmt: skip
    teacher = None
    if chosen.task == "distill":
        logits = np.random.default_rng(SEED).standard_normal((len(device.images.y), CLASSES))
        packed = tensors.pack([("logits", logits.astype(np.float32), "float32")], seed=SEED)
        teacher = device.blobs.put(packed)
    order = Order(
        run="benchmark", sequence=1, round=1, artifact=BlobRef(artifact.digest, 0, 1024), epochs=1,
        lr=LR, seed=SEED, returns={"state": "float32"}, teacher=teacher,
        data_digest=device.images.digest, alpha=ALPHA, temperature=TEMPERATURE, augment=True,
    )  # fmt: skip
    desk = Desk(device.images, device.blobs, threads, lambda *_: None, threading.Event())

    def turn(_seconds: float) -> dict[str, float]:
        return {"steps": perform(order, artifact, KeptFile(), desk).metrics["steps"]}

    return turn, None


def pytorch(variant: Variant) -> Callable[[Path, int], Prepared]:
    """PyTorch in one of its variants."""

    def prepare(folder: Path, threads: int) -> Prepared:
        import torch

        from benchmarks.train_step import network

        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        chosen = setting.load(folder)
        batch = {key: torch.from_numpy(a) for key, a in chosen.load_batch(folder).items()}
        net = network.Objective(chosen).train()
        if variant == "channels-last":
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            batch["x"] = batch["x"].contiguous(memory_format=torch.channels_last)
        sgd = torch.optim.SGD(
            net.parameters(), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True, fused=True
        )
        call = torch.compile(net) if variant == "compile" else net

        def once() -> float:
            loss = call(**batch)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            return float(loss.detach())

        return worker.steps(once, chosen.batch)

    return prepare


def gemm(_folder: Path, threads: int) -> Prepared:
    """The fastest of several square float32 matrix products: the machine's peak."""
    import torch

    torch.set_num_threads(threads)
    pairs = [(torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)) for n in GEMM_SIZES]

    def turn(seconds: float) -> dict[str, float]:
        best, ends = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < ends:
            for left, right, out in pairs:
                began = time.perf_counter()
                torch.mm(left, right, out=out)
                best = max(best, 2 * len(out) ** 3 / (time.perf_counter() - began))
        return {"flops_per_s": best}

    turn(0.1)
    return turn, None


PREPARE: dict[str, Callable[[Path, int], Prepared]] = {
    "stillhouse": stillhouse,
    "pytorch": pytorch("eager"),
    "pytorch-channels-last": pytorch("channels-last"),
    "pytorch-compile": pytorch("compile"),
    "gemm": gemm,
    "agent": agent,
}


def main(arguments: Sequence[str]) -> int:
    """Work as the contender of that name."""
    name, folder, threads = arguments
    return worker.serve(lambda: PREPARE[name](Path(folder), int(threads)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
