"""Optimizers of server training, and how their learning rates change over a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from orchestrator.config import ServerConfig, cosine

OTHERS = 0.015  # Adam's learning rate beside Muon, as a share of Muon's
PULL_EVERY = 5  # steps from one pull of `SlowWeights` to the next


def make_optimizer(model: nn.Module, config: ServerConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "muon":
        return Muon(trained, config.lr)
    if config.optimizer == "adam":
        return torch.optim.Adam(trained, config.lr, weight_decay=config.weight_decay, fused=True)
    return torch.optim.SGD(
        trained,
        config.lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=config.weight_decay,
        fused=True,
    )


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the filters of convolutions, Adam for all other parameters.

    A convolution's filters (O, I, k, k) are a matrix W (O, I k k) with rows of length 1 on average.
    Its step is

        M <- mu M + G,    W <- sqrt(O) W / |W|,    W <- W - lr U(G + mu M)

    where U(X) = A B^T for the singular value decomposition X = A S B^T, computed approximately
    (`orthogonal`). Since |W| is fixed, batch norm must follow each convolution, and weight decay
    has no effect. Adam has the learning rate `OTHERS` lr.

    Args:
        parameters: to train.
        lr: of Muon.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.ndim == 4:
                    _muon(parameter, self.state[parameter], group["lr"])
                else:
                    _adam(parameter, self.state[parameter], group["lr"] * OTHERS)


def _muon(
    parameter: torch.Tensor, state: dict[str, torch.Tensor], lr: float, mu: float = 0.6
) -> None:
    gradient = parameter.grad
    assert gradient is not None  # noqa: S101 - checked by `step`
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    state["momentum"].mul_(mu).add_(gradient)
    ahead = gradient.add(state["momentum"], alpha=mu)
    update = orthogonal(ahead.reshape(len(ahead), -1)).view(ahead.shape)
    parameter.mul_(len(parameter) ** 0.5 / parameter.norm()).add_(update, alpha=-lr)


def _adam(
    parameter: torch.Tensor,
    state: dict[str, torch.Tensor],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    gradient = parameter.grad
    assert gradient is not None  # noqa: S101 - checked by `step`
    if not state:
        state["step"] = torch.zeros(())
        state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    state["mean"].lerp_(gradient, 1 - betas[0])
    state["square"].lerp_(gradient.square(), 1 - betas[1])
    mean, square = (
        state[name] / (1 - beta ** float(state["step"]))
        for name, beta in zip(("mean", "square"), betas, strict=True)
    )
    parameter.addcdiv_(mean, square.sqrt().add_(1e-8), value=-lr)


def orthogonal(x: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """About A B^T (m, n) for the singular value decomposition x = A S B^T.

    Newton-Schulz iteration with the quintic a s + b s^3 + c s^5 of Jordan et al. 2024, whose
    coefficients bring singular values near 1 fast, and not exactly to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = (x / (x.norm() + 1e-7)).to(_product_dtype(x.device))
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


def _product_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class SlowWeights:
    """Slow averages of a model's weights, to which the model is pulled every few steps.

    Lookahead (Zhang et al. 2019, arXiv 1907.08610) with a decay that grows over the run, as in
    Jordan 2024 (arXiv 2404.00498): slow <- d slow + (1 - d) fast, fast <- slow, where
    d = 0.95^5 t^3 at the share t of the run.

    Args:
        model: whose parameters and buffers are averaged, except counters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._fast = [t for t in model.state_dict().values() if t.is_floating_point()]
        self._slow = [tensor.clone() for tensor in self._fast]

    def pull(self, done: float) -> None:
        """Average, and let the model go on from the average; `done` is the share of the run."""
        torch._foreach_lerp_(self._slow, self._fast, 1 - 0.95**PULL_EVERY * done**3)
        self.settle()

    def settle(self) -> None:
        """Give the model the slow weights."""
        torch._foreach_copy_(self._fast, self._slow)


@dataclass(frozen=True)
class Course:
    """The learning rates of one round's server training.

    Attributes:
        schedule: "constant"; "cosine", from lr to 0 epoch by epoch; "linear", to 0 step by step.
        lr: at the run's beginning, or constant.
        epochs: of this round.
        before: epochs of all rounds before.
        total: epochs of all rounds.
    """

    schedule: Literal["constant", "cosine", "linear"]
    lr: float
    epochs: int
    before: int = 0
    total: int = 0

    def done(self, epoch: float) -> float:
        """The share of the run's server training done after so many epochs of this round."""
        return (self.before + epoch) / max(self.total, self.epochs)

    def rate(self, epoch: int, part: float) -> float:
        """The learning rate when this part (0 to 1) of an epoch of this round, from 0, is done."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return cosine(self.lr, self.done(epoch))
        return self.lr * (1 - self.done(epoch + part))


class Schedule:
    """The learning rate of server training, from round to round.

    Args:
        config: names the schedule.
        optimizer: follows it.
        round_: of this training, from 1.
        rounds: of the run.
        noted: what `after` returned in the round before; None in the first.
    """

    def __init__(
        self,
        config: ServerConfig,
        optimizer: torch.optim.Optimizer,
        round_: int,
        rounds: int,
        noted: Mapping[str, Any] | None,
    ) -> None:
        self._plateau = None
        lr, schedule = config.lr, config.schedule
        if schedule == "plateau":
            self._plateau = ReduceLROnPlateau(optimizer, "max", patience=config.patience)
            if noted:
                self._plateau.load_state_dict(dict(noted))
            lr, schedule = float(self._plateau.get_last_lr()[0]), "constant"
        epochs = [config.epochs_in(number + 1) for number in range(rounds)]
        self.course = Course(
            schedule, lr, epochs[round_ - 1], sum(epochs[: round_ - 1]), sum(epochs)
        )

    def after(self, accuracy: float | None) -> dict[str, Any] | None:
        """What the next round's `noted` is, given this round's held-out accuracy."""
        if self._plateau is None:
            return None
        if accuracy is not None:
            self._plateau.step(accuracy)
        return self._plateau.state_dict()


def slots(optimizer: torch.optim.Optimizer) -> dict[str, NDArray[np.float32]]:
    """The optimizer's tensors, named PARAMETER-NUMBER/NAME."""
    return {
        f"{number}/{name}": value.detach().cpu().numpy()
        for number, slot in optimizer.state_dict()["state"].items()
        for name, value in slot.items()
        if isinstance(value, torch.Tensor)
    }


def resume(optimizer: torch.optim.Optimizer, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Put the tensors of `slots` back into an optimizer; without any it starts fresh."""
    if not tensors:
        return
    state: dict[int, dict[str, torch.Tensor]] = {}
    for path, array in tensors.items():
        number, name = path.split("/")
        state.setdefault(int(number), {})[name] = torch.from_numpy(np.array(array))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    # Fused optimizers walk through memory: each slot needs the memory layout of its parameter.
    for parameter, slot in optimizer.state.items():
        for name, value in slot.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                slot[name] = torch.empty_like(parameter).copy_(value)
