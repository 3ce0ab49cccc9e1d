"""The MNIST / EMNIST network of Caldas et al. 2018 (arXiv 1812.07210), section 4.

Two 5x5 convolutions with same padding (32 and 64 filters), each with ReLU and 2x2 max pooling, one
hidden layer (512 units; 2048 for EMNIST's 62 classes), softmax. McMahan et al. 2017 use the same.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CaldasCNN(nn.Module):
    """1,663,370 parameters with 28x28x1 images, 10 classes and 512 hidden units."""

    def __init__(self, classes: int, input_shape: tuple[int, int, int], hidden: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), hidden)
        self.fc2 = nn.Linear(hidden, classes)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, channels, H, W)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))
        return logits
