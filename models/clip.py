"""Feature maps with a bounded L2 norm."""

import torch
from torch import nn


class Clip(nn.Module):
    """Scale each sample (N, ...) down to an L2 norm of at most `norm`."""

    def __init__(self, norm: float) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, ...) -> (N, ...)."""
        flat = features.flatten(1)
        length = flat.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        return (flat * (self.norm / length).clamp(max=1)).view(features.shape)
