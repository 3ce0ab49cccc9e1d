"""The training step as a pure function of tensors, and its trace down to ATen operators.

    loss = mean CE(z, y) + alpha * T^2 * mean KL(softmax(teacher / T) || softmax(z / T))

which is the device's objective in FedGKT (He, Annavaram, Avestimehr 2020, arXiv 2007.14513,
equations 3 and 5: l_c = l_CE + alpha * l_KD with temperature-softened predictions), with the T^2
of Hinton et al. 2015 (arXiv 1503.02531, section 2) that keeps the two gradients of one size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F

from tools.export.lower import trace
from tools.export.optimizers import Optimizer

Task = Literal["distill", "classify"]


@dataclass(frozen=True)
class Tensors:
    """The module's own tensors by role; `fixed` are buffers that no training step may change."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that the optimizer moves."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


def loss(
    logits: Tensor, y: Tensor, teacher: Tensor | None, alpha: Tensor | None, temp: Tensor | None
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
    state: Mapping[str, Tensor],
    batch: Sequence[Tensor],
) -> tuple[fx.GraphModule, list[str]]:
    """One step: (x, y, lr, [teacher, alpha, temperature], parameters, buffers, state, fixed).

    Returns:
        The trace, and the names of its outputs: loss, correct, then `<name>.next` for every
        parameter, buffer and optimizer tensor, and last the fixed buffers under their own names.
    """
    names = [*tensors.parameters, *tensors.buffers, *state, *tensors.fixed]
    outputs: list[str] = []
    scalars = 4 if task == "distill" else 0

    def step(*flat: Tensor) -> list[Tensor]:
        x, y, lr, *rest = flat
        teacher, alpha, temp = rest[:3] if scalars else (None, None, None)
        held = dict(zip(names, rest[3 if scalars else 0 :], strict=True))
        frozen = {n: held[n] for n in tensors.parameters if n not in tensors.trained}

        def objective(
            trained: dict[str, Tensor],
        ) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
            buffers = {n: held[n].clone() for n in (*tensors.buffers, *tensors.fixed)}
            logits = functional_call(module, {**trained, **frozen, **buffers}, (x,))
            return loss(logits, y, teacher, alpha, temp), (buffers, logits)

        trained = {n: held[n] for n in tensors.trained}
        grads, (value, (buffers, logits)) = grad_and_value(objective, has_aux=True)(trained)
        moved, changed = optimizer.update(trained, grads, {n: held[n] for n in state}, lr)
        correct = (logits.argmax(1) == y).to(torch.float32).sum()
        following = {**{n: held[n] for n in tensors.parameters}, **moved}
        following |= {n: buffers[n] for n in tensors.buffers} | changed
        outputs[:] = ["loss", "correct", *(f"{n}.next" for n in following), *tensors.fixed]
        return [value, correct, *following.values(), *(buffers[n] for n in tensors.fixed)]

    held = {**tensors.parameters, **tensors.buffers, **state, **tensors.fixed}
    graph = trace(step, [*batch, *(held[n] for n in names)], module.train())
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
