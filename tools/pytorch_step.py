"""PyTorch at an artifact's training step: `python -m tools.pytorch_step FOLDER THREADS [MODEL]`.

The network that the manifest names trains from the artifact's weights on the batch of
`ondevice.peer`, which asks for turns through the pipe: eager, NCHW, with PyTorch's fused optimizer
and denormals taken for zero. It reports the loss of the first step, so that the other side can see
that both do the same.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import models
from ondevice import peer
from tools import worker
from wire.artifact import open_artifact
from wire.errors import ArtifactError, StillhouseError
from wire.manifest import Manifest


def prepare(folder: Path, threads: int, name: str = "") -> worker.Prepared:
    """A step that is ready to be timed.

    Args:
        folder: the artifact's.
        threads: number of PyTorch's threads; 0 for its default.
        name: the network's name for `models.build`; "" for the manifest's.

    Raises:
        ArtifactError: the artifact's network is not known here.
    """
    if threads:
        torch.set_num_threads(threads)
    artifact = open_artifact(folder)
    manifest = artifact.manifest
    net = _network(manifest, load_file(artifact.weights), name)
    optimizer = _optimizer(manifest, [p for p in net.parameters() if p.requires_grad])
    batch = {name: torch.from_numpy(each) for name, each in peer.batch(manifest).items()}
    size = manifest.micro_batch
    parts = [
        {name: each[begin : begin + size] for name, each in batch.items()}
        for begin in range(0, manifest.batch, size)
    ]

    def step() -> float:
        optimizer.zero_grad()
        whole = 0.0
        for part in parts:  # as the device does: batch norm sees one part at a time
            loss = objective(net(part["x"]), part["y"], part.get("teacher")) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            whole += float(loss.detach())
        optimizer.step()
        return whole

    return worker.steps(step, manifest.batch)


def objective(logits: Tensor, y: Tensor, teacher: Tensor | None) -> Tensor:
    """Mean cross entropy, with a teacher plus alpha * T^2 * KL; as tools.export.tracing.step."""
    ce = F.cross_entropy(logits, y)
    if teacher is None:
        return ce
    alpha, temperature = peer.SETTINGS["alpha"], peer.SETTINGS["temperature"]
    student = F.log_softmax(logits / temperature, 1)
    target = F.log_softmax(teacher / temperature, 1)
    kl = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return ce + alpha * temperature**2 * kl


def _network(manifest: Manifest, state: dict[str, Tensor], name: str) -> nn.Module:
    model = manifest.model
    shape = (model.input[0], model.input[1], model.input[2])
    try:
        net = models.build(name or model.name, classes=model.classes, input_shape=shape)
    except StillhouseError as fault:
        raise ArtifactError(
            f"the artifact's network cannot be made here: {fault}; name where it is with --model"
        ) from fault
    if model.keep_rate != 1:
        net = models.narrow(net, models.layout(net, shape), model.keep_rate)
    weights = {key: state[key] for key in net.state_dict() if key in state}
    if missing := {spec.name for spec in manifest.state_of("parameter")} - set(weights):
        raise ArtifactError(
            f"{name or model.name} is not the artifact's network: it has no {min(missing)!r}; name "
            "the right one with --model"
        )
    net.load_state_dict(weights, strict=False)
    trained = {spec.name for spec in manifest.state_of("parameter")}
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(key in trained)
    return net.train()


def _optimizer(manifest: Manifest, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    chosen, lr = manifest.optimizer, peer.SETTINGS["lr"]
    decay = chosen.weight_decay
    if chosen.name == "adam":
        betas = (chosen.beta1 or 0.0, chosen.beta2 or 0.0)
        return torch.optim.Adam(
            parameters, lr, betas, chosen.eps or 0.0, weight_decay=decay, fused=True
        )
    return torch.optim.SGD(
        parameters, lr, chosen.momentum or 0.0, weight_decay=decay,
        nesterov=bool(chosen.nesterov), fused=True,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Answer on the pipe until it ends; returns the exit code."""
    folder, threads, *name = arguments
    torch.set_flush_denormal(True)  # in this process, which does nothing else
    return worker.serve(lambda: prepare(Path(folder), int(threads), *name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
