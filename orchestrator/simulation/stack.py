"""A cohort's local training in PyTorch, many devices at once: what agents do with ONNX Runtime.

K devices of one shape are one stacked model, parameters (K, ...) and batches (K, B, ...). The loss
is the sum of the devices' own, so each device's gradient is its own, and elementwise optimizers
(SGD, Adam) step all of them as they would step each. On a GPU this fills it; on a CPU one device at
a time is faster (13 ms a step of `caldas_cnn` with a batch of 10, stacked 21 to 29).

Batches come from `ondevice.views`, so that a device sees the same samples in the same order as an
agent with the same data and seed.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from models import SplitModel
from ondevice import views
from ondevice.images import ImageSet, Preprocess
from orchestrator.config import DeviceConfig
from wire.messages import Order

Weights = Mapping[str, NDArray[np.float32]]
AT_ONCE = {"cpu": 16, "cuda": 512}  # images of one pass in evaluation mode; the cache holds 16


@dataclass(frozen=True)
class Job:
    """One device's order and what it has for it.

    Attributes:
        order: all jobs of a stack have one learning rate, number of epochs and temperature.
        images: that it holds.
        start: weights that it begins with.
        optimizer: what its optimizer kept of its last order (`Trained.optimizer`), or nothing.
        teacher: logits (N, C) of its images, where the order brings them.
    """

    order: Order
    images: ImageSet
    start: Weights
    optimizer: Weights = field(default_factory=dict)
    teacher: NDArray[np.float32] | None = None

    @property
    def trained(self) -> int:
        """How many samples are trained on."""
        n = len(self.images.y)
        return n - int(views.held_out(self.images.digest, n, self.order.holdout).sum())

    @property
    def alpha(self) -> float:
        """Weight of the distillation term."""
        return 0.0 if self.teacher is None else self.order.alpha


@dataclass(frozen=True)
class Trained:
    """Weights and optimizer after training; metrics by the names that an agent reports.

    `train_flops` counts convolutions and matrix products alone: 6 % less than an artifact states.
    """

    weights: Weights
    optimizer: Weights
    metrics: dict[str, float]


def train(
    model: nn.Module, config: DeviceConfig, jobs: Sequence[Job], device: torch.device
) -> list[Trained]:
    """Train each job's weights on its images, all jobs together.

    Args:
        model: of the shape that all jobs have; its own weights do not count.
        config: batch, optimizer and normalization.
        jobs: one or more.
        device: where it is computed.
    """
    stack = _Stack(model, [job.start for job in jobs], device)
    anchor = [p.detach().clone() for p in stack.parameters]
    step = _optimizer(stack.parameters, config, jobs[0].order.lr)
    _resume(step, stack, [job.optimizer for job in jobs], device)
    alpha = torch.tensor([job.alpha for job in jobs], device=device)
    temperature = jobs[0].order.temperature
    steps = [job.order.epochs * views.steps(job.trained, config.batch) for job in jobs]
    tallies = [np.zeros(2) for _ in jobs]
    done: dict[int, tuple[Weights, Weights]] = {}
    flops = _flops(model, config)
    batches = [_batches(job, config) for job in jobs]
    for number in range(max(steps)):
        drawn = [next(each) for each in batches]
        x = torch.from_numpy(np.stack([batch.x for batch in drawn])).to(device)
        y = torch.from_numpy(np.stack([batch.y for batch in drawn])).to(device)
        logits = stack(x)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
        losses = losses.view(y.shape).mean(1)
        if alpha.any():
            teacher = torch.from_numpy(np.stack([batch.teacher for batch in drawn])).to(device)
            soft = F.kl_div(
                F.log_softmax(logits / temperature, 2),
                F.log_softmax(teacher / temperature, 2),
                reduction="none",
                log_target=True,
            )
            losses = losses + alpha * temperature**2 * soft.sum(2).mean(1)
        if mu := jobs[0].order.mu:
            pairs = zip(stack.parameters, anchor, strict=True)
            pulls = [(p - a).square().flatten(1).sum(1) for p, a in pairs]
            losses = losses + mu / 2 * torch.stack(pulls).sum(0)
        step.zero_grad(set_to_none=True)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        step.step()
        right = (logits.argmax(2) == y).sum(1).tolist()
        for k, (loss, correct) in enumerate(zip(losses.tolist(), right, strict=True)):
            if number < steps[k]:
                if drawn[k].first:
                    tallies[k][:] = 0
                tallies[k] += loss, correct
            if number + 1 == steps[k]:
                done[k] = stack.weights(k), _kept(step, stack, k)
    return [
        Trained(*done[k], _metrics(steps[k], job.order.epochs, tallies[k], config.batch, flops))
        for k, job in enumerate(jobs)
    ]


@torch.inference_mode()
def extract(
    model: SplitModel,
    images: ImageSet,
    config: DeviceConfig,
    device: torch.device,
    view: int = views.PLAIN,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Feature maps and logits of all images in their order and in evaluation mode, batch by batch.

    Args:
        model: with the device's weights.
        images: that it holds.
        config: its batch is that of a record.
        device: where it is computed, many batches at once.
        view: of the images.
    """
    preprocess = Preprocess(config.mean, config.std)
    records = AT_ONCE[device.type] // config.batch or 1
    for _, pixels, valid in views.batches(images, records * config.batch, view):
        x = np.empty((valid, *config.input), np.float32)
        preprocess(pixels[:valid], out=x)
        shown = torch.from_numpy(x).to(device).contiguous(memory_format=torch.channels_last)
        features, logits = (part.cpu().numpy() for part in model.extract(shown))
        for at in range(0, valid, config.batch):
            end = at + config.batch
            yield np.ascontiguousarray(features[at:end]), logits[at:end]


def _metrics(
    steps: int, epochs: int, tally: NDArray[np.float64], batch: int, flops: int
) -> dict[str, float]:
    per_epoch = steps // epochs
    return {
        "steps": float(steps),
        "train_flops": float(steps * flops),
        "train_loss": float(tally[0]) / per_epoch,
        "train_accuracy": float(tally[1]) / (per_epoch * batch),
    }


class _Batch(NamedTuple):
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    teacher: NDArray[np.float32]
    first: bool  # of its epoch


def _batches(job: Job, config: DeviceConfig) -> Iterator[_Batch]:
    """The job's batches epoch by epoch, then the last one for ever: others may have more."""
    preprocess = Preprocess(config.mean, config.std)
    order, images = job.order, job.images
    x = np.empty((config.batch, *config.input), np.float32)
    silent = np.zeros((len(images.y), config.class_count), np.float32)
    teacher = silent if job.teacher is None else job.teacher
    for epoch in range(order.epochs):
        drawn = views.epoch(
            images,
            batch=config.batch,
            seed=order.seed + epoch,
            augment=order.augment,
            view=order.view,
            holdout=order.holdout,
        )
        for number, (indices, pixels) in enumerate(drawn):
            preprocess(pixels, out=x)
            batch = _Batch(x, images.y[indices], teacher[indices], first=number == 0)
            yield batch
    while True:
        yield batch


class _Stack:
    """K copies of a model with weights of their own: (K, B, ...) to logits (K, B, C)."""

    def __init__(self, model: nn.Module, starts: Sequence[Weights], device: torch.device) -> None:
        self._model = copy.deepcopy(model).to(device).train()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._parts = {
            name: torch.from_numpy(np.stack([start[name] for start in starts]))
            .to(device)
            .requires_grad_(name in trained)
            for name in starts[0]
        }
        self.trained = {name: part for name, part in self._parts.items() if name in trained}
        self.parameters = list(self.trained.values())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor
        if len(x) == 1:
            alone = {name: part.squeeze(0) for name, part in self._parts.items()}
            x = x[0].contiguous(memory_format=torch.channels_last)
            logits = functional_call(self._model, alone, (x,))[None]
        else:
            logits = vmap(lambda parts, x: functional_call(self._model, parts, (x,)))(
                self._parts, x
            )
        return logits

    def weights(self, k: int) -> Weights:
        """Those of one copy, as they are now."""
        return {name: part[k].detach().cpu().numpy().copy() for name, part in self._parts.items()}


def _optimizer(
    parameters: Sequence[torch.Tensor], config: DeviceConfig, lr: float
) -> torch.optim.Optimizer:
    """The optimizer that the devices' artifact is compiled with; see `launch`."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _resume(
    step: torch.optim.Optimizer,
    stack: _Stack,
    kept: Sequence[Weights],
    device: torch.device,
) -> None:
    """Let the optimizer go on where those of the devices were; a device's first begins at zero."""
    slots = {key.split("/", 1)[0] for each in kept for key in each}
    for name, part in stack.trained.items() if slots else ():
        zero = np.zeros(part.shape[1:], np.float32)
        state = step.state[part]
        for slot in slots - {"step"}:
            pieces = [each.get(f"{slot}/{name}", zero) for each in kept]
            state[slot] = torch.from_numpy(np.stack(pieces)).to(device)
        if "step" in slots:
            state["step"] = torch.tensor(float(kept[0]["step/"]))


def _kept(step: torch.optim.Optimizer, stack: _Stack, k: int) -> Weights:
    """What the optimizer has of one copy: SLOT/TENSOR, and `step/`, which all tensors share."""
    found = {}
    for name, part in stack.trained.items():
        for slot, value in step.state[part].items():
            if slot == "step":
                found["step/"] = np.array(float(value), np.float32)
            elif value is not None:
                found[f"{slot}/{name}"] = value[k].detach().cpu().numpy().copy()
    return found


@functools.cache
def _flops(model: nn.Module, config: DeviceConfig) -> int:
    """FLOPs (2 x MAC) of one device's step, forward and backward."""
    one = copy.deepcopy(model).cpu().train()
    with FlopCounterMode(display=False) as counter:
        one(torch.zeros(config.batch, *config.input)).sum().backward()
    return int(counter.get_total_flops())
