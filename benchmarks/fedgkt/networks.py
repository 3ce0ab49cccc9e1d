"""Device networks that are only compared: other feature maps than `resnet8-opponent` makes."""

import torch
from torch import Tensor, nn

from models.resnet import DeviceResNet


def opponent24(classes: int) -> nn.Module:
    """`resnet8-opponent` with feature maps of 24 channels."""
    return DeviceResNet(classes, opponent=True, stem=24)


def opponent32(classes: int) -> nn.Module:
    """`resnet8-opponent` with feature maps of 32 channels."""
    return DeviceResNet(classes, opponent=True, stem=32)


class Pixels(nn.Module):
    """Its feature map is the image itself, so that the large network learns from all pixels.

    Its own logits come from the image's mean colour.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.extractor = nn.Identity()
        self.fc = nn.Linear(3, classes)

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image (N, 3, H, W) and logits (N, classes)."""
        features = self.extractor(x)
        return features, self.fc(torch.mean(features, dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.extract(x)[1]
