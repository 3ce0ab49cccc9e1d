"""Bottleneck ResNets for CIFAR-shaped images, cut into a device half and a server half.

He et al. 2015 (arXiv 1512.03385), section 4.2, with the bottleneck block of its figure 5, cut as in
FedGKT (He, Annavaram, Avestimehr 2020, arXiv 2007.14513, figure 2): the device keeps the stem and
two blocks, the server takes the stem's feature map H and holds the rest of a ResNet-(9n+2).

    device   x (N,3,32,32) -> stem -> H (N,16,32,32) -> 2 blocks -> pool -> FC -> logits (N,classes)
    server                           H (N,16,32,32) -> 3n blocks -> pool -> FC -> logits (N,classes)

A whole ResNet-(9n+2) is the stem and the server half in one module. A block is conv1x1, conv3x3
(which carries the stride), conv1x1 to four times the planes, each followed by batch norm; the
shortcut is a 1x1 projection where the shape changes. The devices ResNet-4 and ResNet-6 have basic
blocks instead, two conv3x3 each, and send the same H as ResNet-8.

The learnt stem has a fixed substitute, `opponent_filters`, for devices that freeze it from the
start. Its filters come in pairs w, -w, and w is even or odd from left to right. So the H of a
mirrored image is H mirrored, with the channels of each odd pair swapped.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EXPANSION = 4
STEM_PLANES = 16
# Of each filter: the colour axis, the waves down and across, and the variance of its output.
OPPONENT: tuple[tuple[int, int, int, float], ...] = (
    (0, 0, 0, 21.0), (1, 0, 0, 1.74), (0, 1, 0, 1.41), (0, 0, 1, 1.14),
    (2, 0, 0, 0.38), (0, 1, 1, 0.28), (0, 2, 0, 0.22), (0, 0, 2, 0.21),
    (0, 1, 2, 0.074), (0, 2, 1, 0.070), (1, 1, 0, 0.067), (1, 0, 1, 0.055),
    (0, 2, 2, 0.023), (2, 1, 0, 0.019), (2, 0, 1, 0.016), (1, 1, 1, 0.010),
)  # fmt: skip
GREY: tuple[tuple[int, int, int, float], ...] = (
    (0, 0, 0, 7.0), (0, 1, 0, 0.47), (0, 0, 1, 0.38), (0, 1, 1, 0.09),
    (0, 2, 0, 0.08), (0, 0, 2, 0.07), (0, 1, 2, 0.02), (0, 2, 1, 0.02),
)  # fmt: skip


class Bottleneck(nn.Module):
    """One bottleneck block: (N, inputs, H, W) -> (N, 4 * planes, H / stride, W / stride)."""

    def __init__(self, inputs: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outputs = EXPANSION * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, after the last ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


class Basic(nn.Module):
    """One basic block with an identity shortcut: (N, planes, H, W) -> (N, planes, H, W)."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, after the last ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + x)


class DeviceResNet(nn.Module):
    """The device half: a small classifier whose stem is the feature extractor W_e.

    ResNet-8 has 10,586 parameters with 3 input channels and 10 classes, 464 of them in the stem.

    Args:
        classes: number of logits.
        channels: of the images.
        depth: 4 or 6, with one or two basic blocks, or 8, with two bottleneck blocks.
        cut: how many blocks belong to the extractor beside the stem. At depth 8, H then has 64
            channels. The same seed gives the same weights at each cut.
        opponent: whether the stem begins as `opponent_filters` instead of at random.
        stem: channels of H at cut 0; with `opponent` an even number up to 32, of grey images 16.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        *,
        depth: int = 8,
        cut: int = 0,
        opponent: bool = False,
        stem: int = STEM_PLANES,
    ) -> None:
        super().__init__()
        width = EXPANSION * 16 if depth == 8 else stem
        blocks: list[nn.Module] = (
            [*_stage(stem, 16, blocks=2, stride=1)]
            if depth == 8
            else [Basic(stem) for _ in range(depth // 2 - 1)]
        )
        self.extractor = nn.Sequential(*_stem(channels, stem), *blocks[:cut])
        self.blocks = nn.Sequential(*blocks[cut:])
        self.fc = nn.Linear(width, classes)
        _initialise(self)
        if opponent:
            half = opponent_filters(channels, stem // 2)
            self.extractor[0].weight.data = torch.cat([half, -half])

    def extract(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature map H (N, 16 or 64, H, W) and logits (N, classes) of x (N, channels, H, W)."""
        features = self.extractor(x)
        pooled = torch.flatten(F.adaptive_avg_pool2d(self.blocks(features), 1), 1)
        return features, self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        return self.extract(x)[1]

    def origins(self) -> dict[str, str]:
        """The whole ResNet's name for each tensor that it has, too; it has no basic blocks."""
        stem = len(_stem(1))
        device_layers = [f"extractor.{i}" for i in range(len(self.extractor))]
        device_layers += [f"blocks.{i}" for i in range(len(self.blocks))]
        whole_layers = [f"extractor.{i}" for i in range(stem)]
        whole_layers += [f"rest.stages.{i}" for i in range(len(device_layers) - stem)]
        return {
            f"{device_layer}.{name}": f"{whole_layer}.{name}"
            for device_layer, whole_layer in zip(device_layers, whole_layers, strict=True)
            if not isinstance(layer := self.get_submodule(device_layer), Basic)
            for name in layer.state_dict()
        }


class ServerResNet(nn.Module):
    """The server half of ResNet-(9n+2): n blocks in each of three stages, on a feature map H."""

    def __init__(self, classes: int, n: int, channels: int = STEM_PLANES) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            *_stage(channels, 16, blocks=n, stride=1),
            *_stage(EXPANSION * 16, 32, blocks=n, stride=2),
            *_stage(EXPANSION * 32, 64, blocks=n, stride=2),
        )
        self.fc = nn.Linear(EXPANSION * 64, classes)
        _initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of feature maps (N, channels, H, W)."""
        pooled = torch.flatten(F.adaptive_avg_pool2d(self.stages(features), 1), 1)
        logits: Tensor = self.fc(pooled)
        return logits

    def origins(self) -> dict[str, str]:
        """The name that each tensor has in the whole ResNet."""
        return {name: f"rest.{name}" for name in self.state_dict()}


class ResNet(nn.Module):
    """A whole ResNet-(9n+2), the network that FedGKT's two halves are compared with."""

    def __init__(self, classes: int, n: int, channels: int = 3) -> None:
        super().__init__()
        self.extractor = _stem(channels)
        self.rest = ServerResNet(classes, n)
        _initialise(self.extractor)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images x (N, channels, H, W)."""
        logits: Tensor = self.rest(self.extractor(x))
        return logits


def opponent_filters(channels: int, number: int) -> Tensor:
    """Filters (number, channels, 3, 3) that whiten natural images: opponent colours times cosines.

    The principal components of 3x3 patches of natural colour images are, nearly exactly, products
    of a colour axis (brightness, red-blue, green-magenta; Ruderman, Cronin, Chiao 1998) and a
    discrete cosine. These have the largest variances of normalized pixels; each is divided by its
    output's standard deviation. With one channel there is one colour axis. There are 16, and 8 of
    one channel.

    Raises:
        ValueError: more are asked for.
    """
    waves = torch.tensor([[1.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [1.0, -2.0, 1.0]])
    waves = waves / waves.norm(dim=1, keepdim=True)
    if channels == 3:
        colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
        rows = OPPONENT
    else:
        colours, rows = torch.ones(1, channels), GREY
    if number > len(rows):
        raise ValueError(f"stem: expected up to {2 * len(rows)} channels, got {2 * number}")
    colours = colours / colours.norm(dim=1, keepdim=True)
    return torch.stack(
        [
            torch.einsum("c,y,x->cyx", colours[colour], waves[down], waves[across]) / variance**0.5
            for colour, down, across, variance in rows[:number]
        ]
    )


def _stem(channels: int, planes: int = STEM_PLANES) -> nn.Sequential:
    """Images (N, channels, H, W) -> H (N, planes, H, W)."""
    return nn.Sequential(
        nn.Conv2d(channels, planes, 3, padding=1, bias=False),
        nn.BatchNorm2d(planes),
        nn.ReLU(),
    )


def _stage(inputs: int, planes: int, *, blocks: int, stride: int) -> Iterator[Bottleneck]:
    yield Bottleneck(inputs, planes, stride)
    for _ in range(blocks - 1):
        yield Bottleneck(EXPANSION * planes, planes)


def _initialise(model: nn.Module) -> None:
    """Normal filters of variance 2 / fan_out (He et al. 2015, arXiv 1502.01852, equation 14)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
