"""A user's own network, in one file outside Stillhouse.

[device]
model = "nets.py:Tiny"    # in run.toml
"""

from torch import Tensor, nn


class Tiny(nn.Module):
    """A convolution, the mean of its output over all pixels, and logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to logits (N, classes)."""
        return self.fc(self.conv(x).relu().mean((2, 3)))
