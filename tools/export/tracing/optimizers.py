"""SGD and Adam as pure functions of (parameter, gradient, state), equal to torch.optim's.

Weight decay is coupled: L2 regularisation, added to the gradient before anything else. Only the
learning rate is an input of the compiled step; every other setting is a constant in it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wire.manifest import OptimizerSettings

State = dict[str, Tensor]
STEP = "optim.step"


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent; with momentum, PyTorch's form (Sutskever et al. 2013).

    v' = momentum * v + g;  p' = p - lr * v', or with Nesterov p - lr * (g + momentum * v').
    """

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0005

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 or more and less than 1, got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: needs a momentum over 0")
        _check_decay(self.weight_decay)

    def settings(self) -> OptimizerSettings:
        """The settings in the form of the manifest."""
        return OptimizerSettings(
            "sgd",
            float(self.weight_decay),
            momentum=float(self.momentum),
            nesterov=self.nesterov,
        )

    def initial(self, parameters: Mapping[str, Tensor]) -> State:
        """One velocity a parameter; none without momentum."""
        if self.momentum == 0:
            return {}
        return {f"optim.momentum.{name}": torch.zeros_like(p) for name, p in parameters.items()}

    def update(
        self,
        parameters: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: State,
        lr: Tensor,
    ) -> tuple[State, State]:
        """The new parameters and the new state."""
        new, changed = {}, {}
        for name, p in parameters.items():
            direction = _decayed(grads[name], p, self.weight_decay)
            if self.momentum:
                key = f"optim.momentum.{name}"
                velocity = self.momentum * state[key] + direction
                changed[key] = velocity
                direction = direction + self.momentum * velocity if self.nesterov else velocity
            new[name] = p - lr * direction
        return new, changed

    def reference(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """PyTorch's optimizer of these settings, for the parity check."""
        return torch.optim.SGD(
            parameters, lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba 2014 (arXiv 1412.6980), algorithm 1, with coupled weight decay."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: expected 0 or more and less than 1, got {beta}")
        if not self.eps > 0:
            raise ValueError(f"eps: expected more than 0, got {self.eps}")
        _check_decay(self.weight_decay)

    def settings(self) -> OptimizerSettings:
        """The settings in the form of the manifest."""
        return OptimizerSettings(
            "adam",
            float(self.weight_decay),
            beta1=float(self.beta1),
            beta2=float(self.beta2),
            eps=float(self.eps),
        )

    def initial(self, parameters: Mapping[str, Tensor]) -> State:
        """Two moments a parameter, and the number of steps done."""
        first = {f"optim.exp_avg.{name}": torch.zeros_like(p) for name, p in parameters.items()}
        second = {f"optim.exp_avg_sq.{name}": torch.zeros_like(p) for name, p in parameters.items()}
        return {**first, **second, STEP: torch.zeros(())}

    def update(
        self,
        parameters: Mapping[str, Tensor],
        grads: Mapping[str, Tensor],
        state: State,
        lr: Tensor,
    ) -> tuple[State, State]:
        """The new parameters and the new state."""
        step = state[STEP] + 1
        # In float32, 1 - 0.999^1 has a relative error of 1e-5; PyTorch does this in Python floats.
        exact = step.double()
        correction1 = (1 - self.beta1**exact).float()
        correction2 = (1 - self.beta2**exact).sqrt().float()
        new: State = {}
        changed: State = {STEP: step}
        for name, p in parameters.items():
            key1, key2 = f"optim.exp_avg.{name}", f"optim.exp_avg_sq.{name}"
            g = _decayed(grads[name], p, self.weight_decay)
            first = self.beta1 * state[key1] + (1 - self.beta1) * g
            second = self.beta2 * state[key2] + (1 - self.beta2) * (g * g)
            new[name] = p - (lr / correction1) * (first / (second.sqrt() / correction2 + self.eps))
            changed[key1], changed[key2] = first, second
        return new, changed

    def reference(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """PyTorch's optimizer of these settings, for the parity check."""
        return torch.optim.Adam(
            parameters, lr, (self.beta1, self.beta2), self.eps, self.weight_decay
        )


Optimizer = Sgd | Adam


def _decayed(grad: Tensor, parameter: Tensor, decay: float) -> Tensor:
    return grad + decay * parameter if decay else grad


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"weight_decay: expected 0 or more and less than 1, got {decay}")
