"""Training the large model on feature maps: the server's half of FedGKT.

He et al. 2020, equation 5; the loss is `loss.mean`. The teacher is z_c, the device's logits of the
same sample, and the student is z_s, the large model's logits. Samples of all shards are shuffled
together. If a shard has feature maps of both the plain and the mirrored view, each epoch crops and
flips them differently. The logits that go back to devices are computed in evaluation mode.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ondevice import views
from orchestrator.config import ServerConfig
from orchestrator.training import loss
from orchestrator.training.optimizers import PULL_EVERY, Course, SlowWeights
from orchestrator.training.samples import Samples
from wire import seeds
from wire.errors import RunError

log = logging.getLogger("orchestrator")

Progress = Callable[[int, int], None]
LOOKS = 1 << 32  # first of the seed's streams that draw looks; lower ones shuffle the samples


class Ranks:
    """The processes that train one model together: here only this one; see `ranks.Group`.

    Each process computes its part of every batch; all have the same weights and optimizer.
    """

    rank, size = 0, 1

    def part(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """This process's part of a batch, or of any list of sample numbers."""
        return numbers

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with rank 0's weights; its gradients become the mean of all ranks' gradients."""
        return model

    def settle(self, model: nn.Module) -> None:
        """Give all ranks the mean of their batch-norm statistics."""

    def sum(self, value: float) -> float:
        """The sum of all ranks' values."""
        return value

    def gather(self, rows: NDArray[np.float32], total: int) -> NDArray[np.float32]:
        """On rank 0 all `total` rows, in their order; on other ranks this rank's rows."""
        del total
        return rows


ALONE = Ranks()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    config: ServerConfig,
    *,
    seed: int,
    progress: Progress,
    course: Course | None = None,
    group: Ranks = ALONE,
) -> float:
    """Train `model` for a round's passes over the samples; returns the last pass's mean loss.

    Args:
        model: W_s.
        optimizer: of `model`.
        samples: of all devices.
        config: batch, precision, views and the loss.
        seed: of the order of samples, and of their looks.
        progress: called after each step.
        course: number of passes, one or more, and their learning rates; None: those of a first
            round at `config.lr`.
        group: the ranks that train together; each calls this function with all samples.

    Raises:
        RunError: the loss is no longer finite.

    Batches are drawn from all devices' samples in one shuffled order. A last batch of fewer than
    two samples a rank is left out, since batch norm cannot normalize a single one. The loss is
    added up on the device that computes it, so that no step waits for a GPU.
    """
    device = next(model.parameters()).device
    course = course or Course("constant", config.lr, config.epochs_in(1))
    trained = samples.trained
    batches, mean = -(-len(trained) // config.batch), 0.0
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    joint = group.wrap(model)
    whole = torch.compile(joint, dynamic=False) if config.compile else joint
    slow = SlowWeights(model) if config.averaging else None
    for epoch in range(course.epochs):
        order = trained[seeds.raw(seed, epoch, len(trained)).argsort(kind="stable")]
        size = None
        if samples.crops_all and course.done(epoch) < config.small_crops:
            size = small(samples.shape)
        looks = _looks(config, seed, epoch, samples, size)
        total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
        for i in range(batches):
            chosen = order[i * config.batch : (i + 1) * config.batch]
            if len(chosen) < 2 * group.size:
                continue
            for parameters in optimizer.param_groups:
                parameters["lr"] = course.rate(epoch, i / batches)
            part = group.part(chosen)
            drawn = samples.draw(part, looks.of(part), size)
            with autocast(config, device):
                out = (whole if len(chosen) == config.batch else joint)(drawn.features)
            value = loss.mean(
                out.float(),
                drawn.labels,
                drawn.logits if config.alpha else None,
                alpha=config.alpha,
                temperature=config.temperature,
                smoothing=config.label_smoothing,
                weights=drawn.weights,
                total=None if group.size == 1 else samples.weight(chosen),
            )
            optimizer.zero_grad(set_to_none=True)
            # DDP averages gradients, but the batch's gradient is the sum of the ranks' gradients.
            (value * group.size).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            step = epoch * batches + i + 1
            if slow and step % PULL_EVERY == 0:
                slow.pull(course.done(step / batches))
            total += value.detach() * len(chosen)
            seen += len(chosen)
            progress(step, course.epochs * batches)
        mean = group.sum(float(total)) / max(seen, 1)
        if not np.isfinite(mean):
            raise RunError(
                f"server training diverged in epoch {epoch + 1} (loss {mean}); lower server.lr and "
                "start again: the run goes on after its last closed round"
            )
    if slow:
        slow.settle()
    group.settle(model)
    return mean


def small(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the crops of `server.small_crops`, of maps (C, H, W)."""
    return 3 * shape[1] // 4, 3 * shape[2] // 4


def _looks(
    config: ServerConfig, seed: int, epoch: int, samples: Samples, size: tuple[int, int] | None
) -> views.Looks:
    """How each sample is cropped, to this size or its own, and mirrored in an epoch."""
    count, (height, width) = len(samples), samples.shape[1:]
    smaller = (height - size[0], width - size[1]) if size else (0, 0)
    looks = views.drawn(seeds.raw(seed, LOOKS + epoch, 3 * count), config.shift, smaller)
    if config.flips == "alternating":
        first = views.drawn(seeds.raw(seed, LOOKS, 3 * count)).flips
        looks = looks._replace(flips=first ^ (epoch % 2 == 1))
    return looks


def autocast(config: ServerConfig, device: torch.device) -> torch.autocast:
    """The context that sets the precision of convolutions and matrix products."""
    low = precision(config, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def precision(config: ServerConfig, device: torch.device) -> torch.dtype:
    """What convolutions and matrix products are computed in: bfloat16 or float32."""
    chosen = config.precision
    if chosen == "auto":
        chosen = "bfloat16" if device.type == "cuda" else "float32"
    if chosen == "bfloat16" and device.type == "cpu" and not computes_bfloat16():
        chosen = "float32"
    return torch.bfloat16 if chosen == "bfloat16" else torch.float32


@cache
def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; others emulate it, slower than float32.

    Says so once if it does not.
    """
    if any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name):
        return True
    log.warning("this processor does not compute in bfloat16; server.precision is float32 instead")
    return False


def teach(
    model: nn.Module,
    samples: Samples,
    span: range,
    config: ServerConfig,
    view: int = views.PLAIN,
    *,
    group: Ranks = ALONE,
) -> NDArray[np.float32]:
    """z_s (n, C) of a span of samples, in their order, computed in evaluation mode.

    Args:
        model: W_s.
        samples: of all devices.
        span: the numbers of one device's samples.
        config: how many to compute at once, and the precision.
        view: the view to compute, for samples whose feature maps can be cropped.
        group: the ranks, which compute a part each; rank 0 gets all. The span must have at least
            one sample a rank.
    """
    numbers, looks = group.part(np.arange(len(span))), views.looks(view, len(span))
    size = _at_once(model, config)
    pieces = np.split(numbers, range(size, len(numbers), size))
    drawn = (samples.draw(span.start + piece, looks.of(piece)) for piece in pieces)
    return group.gather(_logits(model, (batch.features for batch in drawn), config), len(span))


def predict(
    model: nn.Module, inputs: torch.Tensor | NDArray[np.float32], config: ServerConfig
) -> NDArray[np.float32]:
    """Logits (N, C) of inputs (N, ...), in their order, computed in evaluation mode."""
    device = next(model.parameters()).device
    pieces = torch.split(torch.as_tensor(inputs), _at_once(model, config))
    return _logits(
        model, (p.to(device).contiguous(memory_format=torch.channels_last) for p in pieces), config
    )


def _at_once(model: nn.Module, config: ServerConfig) -> int:
    """How many images one evaluation pass takes."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return config.eval_batch or (16 if on_cpu else 1024)


@torch.inference_mode()
def _logits(
    model: nn.Module, inputs: Iterable[torch.Tensor], config: ServerConfig
) -> NDArray[np.float32]:
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with autocast(config, next(model.parameters()).device):
        parts = [model(piece).float() for piece in inputs]
    return torch.cat(parts).cpu().numpy()


def accuracy(logits: NDArray[np.float32], labels: torch.Tensor) -> float:
    """Share of the samples whose largest logit is at their label."""
    return float((logits.argmax(axis=1) == labels.numpy()).mean())


def weights(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Copies of a model's parameters and buffers, without counters (`num_batches_tracked`)."""
    return {
        name: tensor.detach().cpu().numpy().copy()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def load(model: nn.Module, tensors: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """Put parameters and buffers into a model, which keeps its counters (`num_batches_tracked`).

    Raises:
        RuntimeError: a name or shape differs.
    """
    counters = {n: v for n, v in model.state_dict().items() if n.endswith("num_batches_tracked")}
    loaded = {n: torch.from_numpy(np.array(a)) for n, a in tensors.items()}
    model.load_state_dict({**counters, **loaded})
    return model
