"""The network that devices train: small, so that hundreds of runs take minutes."""

from torch import nn


def small(classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Two convolutions with strides and two linear layers."""
    channels, height, width = input_shape
    places = -(-height // 4) * -(-width // 4)
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * places, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
