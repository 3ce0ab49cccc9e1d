"""The training step as a pure function of tensors, and its trace down to ATen operators.

    loss = mean CE(z, y) + alpha * T^2 * mean KL(softmax(teacher / T) || softmax(z / T))

which is the device's objective in FedGKT (He, Annavaram, Avestimehr 2020, arXiv 2007.14513,
equations 3 and 5: l_c = l_CE + alpha * l_KD with temperature-softened predictions), with the T^2
of Hinton et al. 2015 (arXiv 1503.02531, section 2) that keeps the two gradients of one size.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F

from tools.export.lower import trace
from tools.export.optimizers import Optimizer
from tools.export.provenance import LOSS, OPTIMIZER, at
from tools.export.state import Piece, Tensors

Task = Literal["distill", "classify"]


def loss(
    logits: Tensor,
    y: Tensor,
    teacher: Tensor | None = None,
    alpha: Tensor | None = None,
    temp: Tensor | None = None,
) -> Tensor:
    """The objective above; logits and teacher (B, C), y int64 (B), alpha and temp scalars."""
    batch, classes = logits.shape
    chosen = (y[:, None] == torch.arange(classes)).to(logits.dtype)
    ce = -(F.log_softmax(logits, 1) * chosen).sum() / batch
    if teacher is None or alpha is None or temp is None:
        return ce
    student = F.log_softmax(logits / temp, 1)
    # A probability under e^-104 is 0 in float32, so the bound changes nothing but 0 * -inf, which
    # a teacher of huge finite logits would otherwise bring in even at alpha = 0.
    target = F.log_softmax(teacher / temp, 1).clamp(min=-1e4)
    kl = (target.exp() * (target - student)).sum() / batch
    return ce + alpha * temp * temp * kl


def trace_train(
    module: nn.Module,
    tensors: Tensors,
    *,
    task: Task,
    optimizer: Optimizer,
    pieces: Sequence[Piece],
    batch: Sequence[Tensor],
    micro_batches: int = 1,
) -> tuple[fx.GraphModule, list[str]]:
    """One step on (batch, settings, parameters, buffers, pieces, their optimizer state, fixed).

    With several micro-batches the gradients are summed over them, one after the other, and the
    optimizer moves once. The loss is the mean over the batch all the same; batch norm normalizes
    each micro-batch by itself and updates its running statistics once for each ("ghost batch norm",
    Hoffer et al. 2017, arXiv 1705.08741, algorithm 1).

    Returns:
        The trace, and the names of its outputs: loss, correct, then buffers, pieces, optimizer
        state and fixed buffers under the names of the inputs that they follow.
    """
    theta = {piece.key: piece.gradient(tensors.trained).detach() for piece in pieces}
    state = optimizer.initial(theta)
    sources = {**tensors.parameters, **tensors.buffers, **theta, **state, **tensors.fixed}
    outputs: list[str] = []
    settings = 1 if task == "classify" else 3

    def step(*flat: Tensor) -> list[Tensor]:
        samples = flat[: len(batch) - settings]
        lr, *kd = flat[len(samples) : len(batch)]
        held = dict(zip(sources, flat[len(batch) :], strict=True))
        frozen = {n: held[n] for n in tensors.parameters if n not in tensors.trained}
        trained = {n: held[n] for n in tensors.trained}
        buffers = {n: held[n] for n in (*tensors.buffers, *tensors.fixed)}

        def objective(
            trained: dict[str, Tensor], x: Tensor, y: Tensor, *teacher: Tensor
        ) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
            changed = {n: buffer.clone() for n, buffer in buffers.items()}
            at("")
            logits = functional_call(module, {**trained, **frozen, **changed}, (x,))
            at(LOSS)
            correct = (logits.argmax(1) == y).to(torch.float32).sum()
            value = loss(logits, y, *teacher, *kd)
            return value if micro_batches == 1 else value / micro_batches, (changed, correct)

        sums: list[Tensor] = []
        grads: dict[str, Tensor] = {}
        for part in zip(*(sample.chunk(micro_batches) for sample in samples), strict=True):
            own, (value, (buffers, correct)) = grad_and_value(objective, has_aux=True)(
                trained, *part
            )
            at(OPTIMIZER, "update")
            grads = {n: grads[n] + g if grads else g for n, g in own.items()}
            at(LOSS)
            sums = (
                [a + b for a, b in zip(sums, (value, correct), strict=True)]
                if sums
                else [value, correct]
            )
        at(OPTIMIZER, "update")
        gradients = {piece.key: piece.gradient(grads) for piece in pieces}
        moved, changed = optimizer.update(
            {n: held[n] for n in theta}, gradients, {n: held[n] for n in state}, lr
        )
        own_buffers = {n: buffers[n] for n in tensors.buffers}
        following = {**own_buffers, **moved, **changed, **{n: buffers[n] for n in tensors.fixed}}
        outputs[:] = ["loss", "correct", *following]
        return [*sums, *following.values()]

    graph = trace(step, [*batch, *sources.values()], module.train())
    return graph, outputs


class _Extract(nn.Module):
    """Calls `extract` where `functional_call` would call `forward`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.inner.extract(x)  # type: ignore[operator]
        return features, logits


def trace_eval(module: nn.Module, tensors: Tensors, x: Tensor, *, extract: bool) -> fx.GraphModule:
    """Evaluation mode: (x, parameters, buffers, fixed) -> logits, or features and logits."""
    held = {**tensors.parameters, **tensors.buffers, **tensors.fixed}
    called = _Extract(module) if extract else module
    prefix = "inner." if extract else ""

    def forward(x: Tensor, *flat: Tensor) -> list[Tensor]:
        named = {prefix + n: t for n, t in zip(held, flat, strict=True)}
        result = functional_call(called, named, (x,))
        return list(result) if extract else [result]

    module.eval()
    with torch.no_grad():
        return trace(forward, [x, *held.values()], module)
