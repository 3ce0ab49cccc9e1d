"""Training the large model on feature maps: the server's half of FedGKT.

    l_s = CE(z_s, y) + alpha * T^2 * KL(softmax(z_c / T) || softmax(z_s / T))

He et al. 2020, equation 5 (with the T^2 that keeps the gradient's size independent of T, Hinton
et al. 2015). z_c are the device's logits of the same sample, z_s the large model's. Samples of all
shards are shuffled together; the logits that go back are computed in evaluation mode.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from orchestrator.config import ServerConfig
from orchestrator.samples import Samples
from wire import seeds
from wire.errors import RunError

Progress = Callable[[int, int], None]


def loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor,
    *,
    alpha: float,
    temperature: float,
) -> torch.Tensor:
    """Mean over the batch of CE + alpha * T^2 * KL(teacher || student).

    Args:
        logits: z_s, (B, C).
        labels: y, (B,) int64.
        teacher: z_c, (B, C).
        alpha: weight of the distillation term.
        temperature: T.
    """
    hard = F.cross_entropy(logits, labels)
    soft = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return hard + alpha * temperature**2 * soft


def optimizer(model: nn.Module, config: ServerConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names."""
    if config.optimizer == "adam":
        return torch.optim.Adam(
            model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.SGD(
        model.parameters(),
        config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
        fused=True,
    )


def train(
    model: nn.Module,
    step: torch.optim.Optimizer,
    samples: Samples,
    config: ServerConfig,
    *,
    seed: int,
    progress: Progress,
) -> float:
    """Train `model` for `config.epochs` passes over all samples; returns the last one's mean loss.

    Raises:
        RunError: the loss is not finite any more.

    Batches are drawn from all devices' samples in one shuffled order; a last batch of a single
    sample is left out, since batch norm cannot normalize it. The loss is added up where it is
    computed, so that a GPU is not waited for in every step.
    """
    device = next(model.parameters()).device
    batches, mean = -(-len(samples) // config.batch), 0.0
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whole = torch.compile(model, dynamic=False) if config.compile else model
    for epoch in range(config.epochs):
        order = seeds.raw(seed, epoch, len(samples)).argsort(kind="stable")
        total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
        for i in range(batches):
            chosen = order[i * config.batch : (i + 1) * config.batch]
            if len(chosen) < 2:
                continue
            drawn = samples.draw(chosen)
            with autocast(config, device):
                out = (whole if len(chosen) == config.batch else model)(drawn.features)
            value = loss(
                out.float(),
                drawn.labels,
                drawn.logits,
                alpha=config.alpha,
                temperature=config.temperature,
            )
            step.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            step.step()
            total += value.detach() * len(chosen)
            seen += len(chosen)
            progress(epoch * batches + i + 1, config.epochs * batches)
        mean = float(total) / max(seen, 1)
        if not np.isfinite(mean):
            raise RunError(
                f"server training diverged in epoch {epoch + 1} (loss {mean}); lower server.lr and "
                "start again: the run goes on after its last closed round"
            )
    return mean


def autocast(config: ServerConfig, device: torch.device) -> torch.autocast:
    """The precision of convolutions and matrix products."""
    chosen = config.precision
    if chosen == "auto":
        chosen = "bfloat16" if device.type == "cuda" else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bfloat16")


def teach(
    model: nn.Module, samples: Samples, span: range, config: ServerConfig
) -> NDArray[np.float32]:
    """z_s (n, C) of a span of samples, in evaluation mode and their order."""
    numbers = np.arange(span.start, span.stop)
    pieces = np.split(numbers, range(config.eval_batch, len(numbers), config.eval_batch))
    return _logits(model, (samples.draw(piece).features for piece in pieces), config)


def predict(
    model: nn.Module, inputs: torch.Tensor | NDArray[np.float32], config: ServerConfig
) -> NDArray[np.float32]:
    """Logits (N, C) in evaluation mode of inputs (N, ...), in their order."""
    device = next(model.parameters()).device
    pieces = torch.split(torch.as_tensor(inputs), config.eval_batch)
    return _logits(
        model, (p.to(device).contiguous(memory_format=torch.channels_last) for p in pieces), config
    )


@torch.inference_mode()
def _logits(
    model: nn.Module, inputs: Iterable[torch.Tensor], config: ServerConfig
) -> NDArray[np.float32]:
    model.eval()
    with autocast(config, next(model.parameters()).device):
        parts = [model(piece).float() for piece in inputs]
    return torch.cat(parts).cpu().numpy()


def accuracy(logits: NDArray[np.float32], labels: torch.Tensor) -> float:
    """Share of samples whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == labels.numpy()).mean())


def weights(model: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Parameters and buffers of a model as copies, counters (`num_batches_tracked`) aside."""
    return {
        name: tensor.detach().cpu().numpy().copy()
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def load(model: nn.Module, tensors: Mapping[str, NDArray[np.float32]]) -> nn.Module:
    """Put parameters and buffers into a model, counters (`num_batches_tracked`) aside.

    Raises:
        RuntimeError: a name or shape differs.
    """
    own = model.state_dict()
    given = {n: torch.from_numpy(np.array(a)) for n, a in tensors.items()}
    counters = {n: v for n, v in own.items() if n.endswith("num_batches_tracked")}
    model.load_state_dict({**counters, **given})
    return model
