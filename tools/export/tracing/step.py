"""The training step as a pure function of tensors, and its trace down to ATen operators.

    loss = mean CE(z, y) + alpha * T^2 * mean KL(softmax(teacher / T) || softmax(z / T))

which is the device's objective in FedGKT (He, Annavaram, Avestimehr 2020, arXiv 2007.14513,
equations 3 and 5: l_c = l_CE + alpha * l_KD with temperature-softened predictions), with the T^2
of Hinton et al. 2015 (arXiv 1503.02531, section 2) that keeps the two gradients of one size. With a
proximal term, mu / 2 * |w - w0|^2 is added, where w0 are the parameters that training starts from
(FedProx, Li et al. 2018, arXiv 1812.06127, equation 2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F

from tools.export.lower import trace
from tools.export.tracing.optimizers import Optimizer, State
from tools.export.tracing.provenance import LOSS, OPTIMIZER, at
from tools.export.tracing.state import Piece, Tensors
from wire.manifest import ANCHOR

Task = Literal["distill", "classify"]
GRADIENT = "optim.gradient."


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


@dataclass(frozen=True)
class Extras:
    """Options of a step that add tensors to its state."""

    micro_batches: int = 1
    proximal: bool = False

    def initial(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> State:
        """The optimizer's tensors, waiting gradients, and the parameters as training begins."""
        state = optimizer.initial(parameters)
        if self.micro_batches > 1:
            state |= {GRADIENT + name: torch.zeros_like(p) for name, p in parameters.items()}
        if self.proximal:
            state |= {ANCHOR + name: p.detach().clone() for name, p in parameters.items()}
        return state


def trace_train(
    module: nn.Module,
    tensors: Tensors,
    *,
    optimizer: Optimizer,
    pieces: Sequence[Piece],
    batch: Mapping[str, Tensor],
    settings: Mapping[str, Tensor],
    extras: Extras,
) -> tuple[fx.GraphModule, list[str]]:
    """Trace a step on (batch, settings, parameters, buffers, pieces, optimizer state, fixed).

    With several micro-batches, one step of the optimizer takes as many runs, and the step's loss is
    the sum of theirs. The gradients wait in the state between the runs. The setting `first` is 1 in
    the first run, which begins with no gradients, and `last` is 1 in the last run, which moves the
    parameters; in other runs they are 0. Batch norm normalizes each micro-batch by itself and
    updates its running statistics once for each ("ghost batch norm", Hoffer et al. 2017, arXiv
    1705.08741, algorithm 1).

    Returns:
        The trace, and the names of its outputs: loss, correct, then the new values of buffers,
        pieces, optimizer state and fixed buffers, each under the name of its input.
    """
    theta = {piece.key: piece.gradient(tensors.trained).detach() for piece in pieces}
    state = extras.initial(optimizer, theta)
    sources = {
        **batch, **settings, **tensors.parameters, **tensors.buffers, **theta, **state,
        **tensors.fixed,
    }  # fmt: skip
    outputs: list[str] = []

    def step(*flat: Tensor) -> list[Tensor]:
        inputs = dict(zip(sources, flat, strict=True))
        frozen = {n: inputs[n] for n in tensors.parameters if n not in tensors.trained}
        kd = (inputs.get(n) for n in ("teacher", "alpha", "temperature"))

        def objective(
            trained: dict[str, Tensor],
        ) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor]]:
            buffers = {n: inputs[n].clone() for n in (*tensors.buffers, *tensors.fixed)}
            at("")
            logits = functional_call(module, {**trained, **frozen, **buffers}, (inputs["x"],))
            at(LOSS)
            correct = (logits.argmax(1) == inputs["y"]).to(torch.float32).sum()
            value = loss(logits, inputs["y"], *kd)
            parts = extras.micro_batches
            return value / parts if parts > 1 else value, (buffers, correct)

        grads, (value, (buffers, correct)) = grad_and_value(objective, has_aux=True)(
            {n: inputs[n] for n in tensors.trained}
        )
        at(OPTIMIZER, "update")
        gradients = {piece.key: piece.gradient(grads) for piece in pieces}
        old = {n: inputs[n] for n in (*theta, *state)}
        if extras.proximal:
            value = value + _add_proximal(old, gradients, inputs)
        new = _updated(optimizer, old, gradients, inputs)
        following = {n: buffers[n] for n in tensors.buffers} | new
        outputs[:] = ["loss", "correct", *following, *tensors.fixed]
        return [value, correct, *following.values(), *(buffers[n] for n in tensors.fixed)]

    graph = trace(step, list(sources.values()), module.train())
    return graph, outputs


def _add_proximal(old: State, gradients: State, inputs: Mapping[str, Tensor]) -> Tensor:
    """The proximal term of a step; its gradient mu (w - w0) is added to `gradients`.

    With several micro-batches, the first one has all of it.
    """
    pull = inputs["mu"] * inputs["first"] if "first" in inputs else inputs["mu"]
    squares = []
    for name in gradients:
        distance = old[name] - old[ANCHOR + name]
        gradients[name] = gradients[name] + pull * distance
        squares.append((distance * distance).sum())
    return pull / 2 * torch.stack(squares).sum()


def _updated(
    optimizer: Optimizer, old: State, gradients: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> State:
    """The parameters, optimizer state and waiting gradients after a run."""
    theta = {n: old[n] for n in gradients}
    waiting = {n: GRADIENT + n for n in gradients if GRADIENT + n in old}
    if not waiting:
        moved, changed = optimizer.update(theta, gradients, old, inputs["lr"])
        return moved | changed
    others = 1 - inputs["first"]
    sums = {n: old[key] * others + gradients[n] for n, key in waiting.items()}
    moved, changed = optimizer.update(theta, sums, old, inputs["lr"])
    stay, move = 1 - inputs["last"], inputs["last"]
    blended = {n: old[n] * stay + value * move for n, value in (moved | changed).items()}
    return blended | {key: sums[n] for n, key in waiting.items()}


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
    state = {**tensors.parameters, **tensors.buffers, **tensors.fixed}
    called = _Extract(module) if extract else module
    prefix = "inner." if extract else ""

    def forward(x: Tensor, *flat: Tensor) -> list[Tensor]:
        named = {prefix + n: t for n, t in zip(state, flat, strict=True)}
        result = functional_call(called, named, (x,))
        return list(result) if extract else [result]

    module.eval()
    with torch.no_grad():
        return trace(forward, [x, *state.values()], module)
