"""Fast large networks for 32x32 inputs: a few wide 3x3 convolutions, trained in minutes on a CPU.

The family of Jordan 2024 ("94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv 2404.00498),
without its whitening layer: these networks take whatever feature map an extractor makes.

    H (N, C, 32, 32) -> 3 groups -> largest value of each channel -> FC, divided by 9 -> logits

A group is conv3x3, max pooling 2x2, batch norm, GELU, and then one or two more of conv3x3, batch
norm, GELU; with two more, the sum of the group's first output and its last convolution enters the
last GELU. Groups have w, 4 w and 4 w channels.

Batch norm has no learnt scale, and no convolution has a bias. So the length of a filter changes
nothing, and Muon keeps it fixed (`training.optimizers`). The first filters of each convolution
begin as the identity.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROWTH = 1, 4, 4  # channels of the groups, in widths
HEAD = 9.0  # divides the logits, so that the first ones are small


class FastCNN(nn.Module):
    """A fast network on inputs (N, channels, H, W), with H and W of 8 or more.

    Args:
        classes: number of logits.
        channels: of the input.
        width: channels of the first group.
        depth: convolutions in a group, 2 or 3.
    """

    def __init__(self, classes: int, channels: int, *, width: int, depth: int) -> None:
        super().__init__()
        widths = [channels, *(width * factor for factor in GROWTH)]
        self.groups = nn.Sequential(*(_Group(a, b, depth) for a, b in pairwise(widths)))
        self.fc = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.fc(torch.amax(self.groups(x), dim=(2, 3))) / HEAD
        return logits


class _Group(nn.Module):
    """(N, inputs, H, W) -> (N, outputs, H / 2, W / 2)."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * depth
        convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes)]
        norms = [nn.BatchNorm2d(outputs, momentum=0.4) for _ in convs]
        for conv, norm in zip(convs, norms, strict=True):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])
            norm.weight.requires_grad = False
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)

    def forward(self, x: Tensor) -> Tensor:
        x = first = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        for conv, norm in zip(self.convs[1:-1], self.norms[1:-1], strict=True):
            x = F.gelu(norm(conv(x)))
        x = self.norms[-1](self.convs[-1](x))
        return F.gelu(x + first if len(self.convs) > 2 else x)
