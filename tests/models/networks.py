"""Small networks of many kinds, with their groups of units and masks written out by hand.

`groups` are the groups of units that a network must have. `masks` takes for each group a vector
that is 1 for units that stay and 0 for the others. It returns the factors by which the outputs of
some modules are multiplied, so that the network computes as without the units left out.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from models.fastcnn import FastCNN
from models.resnet import Basic, Bottleneck, ServerResNet

CLASSES = 10


class Inverted(nn.Module):
    """MobileNetV2's block (arXiv 1801.04381); each depthwise filter may make several channels."""

    def __init__(self, inputs, wide, times=1):
        super().__init__()
        self.up, self.up_norm = nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth = nn.Conv2d(wide, times * wide, 3, padding=1, groups=wide)
        self.depth_norm = nn.BatchNorm2d(times * wide)
        self.down = nn.Conv2d(times * wide, inputs, 1, bias=False)
        self.down_norm = nn.BatchNorm2d(inputs)

    def forward(self, x):
        y = F.relu6(self.up_norm(self.up(x)))
        y = F.relu6(self.depth_norm(self.depth(y)))
        return x + self.down_norm(self.down(y))


class MobileNet(nn.Module):
    groups = MappingProxyType({"stem": 8, "first.up": 12, "second.up": 6})

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.first, self.second = Inverted(8, 12), Inverted(8, 6, times=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.second(self.first(self.stem(x)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def masks(self, kept):
        return {
            **dict.fromkeys(("stem", "first.down_norm", "second.down_norm"), kept["stem"]),
            **dict.fromkeys(("first.up_norm", "first.depth_norm"), kept["first.up"]),
            "second.up_norm": kept["second.up"],
            "second.depth_norm": kept["second.up"].repeat_interleave(2),
        }


class DenseNet(nn.Module):
    """DenseNet's block (arXiv 1608.06993): each layer reads the outputs of all earlier layers."""

    groups = MappingProxyType({"stem": 8, "a": 4, "b": 6, "transition": 10})

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 12))
        self.a, self.b = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(12, 6, 3, padding=1)
        self.transition = nn.Conv2d(18, 10, 1)
        self.head = nn.Linear(10 * 4 * 4, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.a(F.relu(self.norms[0](x)))], 1)
        x = torch.cat([x, self.b(F.relu(self.norms[1](x)))], 1)
        return self.head(torch.flatten(F.avg_pool2d(self.transition(x), 2), 1))

    def masks(self, kept):
        seen = {"norms.0": kept["stem"], "norms.1": torch.cat([kept["stem"], kept["a"]])}
        return dict(kept) | seen  # batch norms shift values that were masked before them


class PreActivation(nn.Module):
    """Pre-activation residuals (arXiv 1603.05027); the wider stage's skip is padded by zeros."""

    groups = MappingProxyType({"stem": 8, "a": 6, "c": 10})

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (8, 6, 8, 10))
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.c, self.d = nn.Conv2d(8, 10, 3, 2, padding=1), nn.Conv2d(10, 16, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(F.silu(self.norms[1](self.a(F.silu(self.norms[0](x))))))
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        x = skip + self.d(F.silu(self.norms[3](self.c(F.silu(self.norms[2](x))))))
        return self.head(x.mean((2, 3)))

    def masks(self, kept):
        middle = torch.cat([torch.ones(4), kept["stem"], torch.ones(4)])
        by_norm = {f"norms.{i}": kept[name] for i, name in enumerate(("stem", "a", "stem", "c"))}
        return {"stem": kept["stem"], "b": kept["stem"], "d": middle} | by_norm


class Grouped(nn.Module):
    """ResNeXt's grouped convolution with group norms; the last norm mixes all of its channels."""

    groups = MappingProxyType({"a": 4})

    def __init__(self):
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12)
        self.b, self.b_norm = nn.Conv2d(12, 8, 3, groups=4), nn.GroupNorm(4, 8)
        self.c, self.c_norm = nn.Conv2d(8, 6, 1), nn.GroupNorm(1, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = F.relu(self.b_norm(self.b(F.relu(self.a_norm(self.a(x))))))
        return self.head(F.adaptive_max_pool2d(self.c_norm(self.c(x)), 1).squeeze())

    def masks(self, kept):
        return {
            "a_norm": kept["a"].repeat_interleave(3),
            "b_norm": kept["a"].repeat_interleave(2),
        }


class Perceptron(nn.Sequential):
    """Hidden layers of three kinds of activation, one of which is not 0 at 0."""

    groups = MappingProxyType({"1": 24, "4": 16, "7": 12})

    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 24), nn.BatchNorm1d(24), nn.Sigmoid(),
            nn.Linear(24, 16), nn.PReLU(16), nn.Dropout(0.0), nn.Linear(16, 12, bias=False),
            nn.Tanh(), nn.Linear(12, CLASSES),
        )  # fmt: skip

    def masks(self, kept):
        return {"3": kept["1"], "5": kept["4"], "8": kept["7"]}


class Decoder(nn.Module):
    """Down- and upsampling (arXiv 1505.04597), with instance norm and squeeze-and-excitation."""

    groups = MappingProxyType({"a": 6, "b": 8, "squeeze": 4, "grow": 5, "last": 7})

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.norm = nn.InstanceNorm2d(6, affine=True)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.grow = nn.ConvTranspose2d(8, 5, 2, 2)
        self.last, self.head = nn.Conv2d(11, 7, 1), nn.Conv2d(7, CLASSES, 1)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.a(x)))
        y = self.b(F.max_pool2d(x, 2))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = F.interpolate(self.grow(y), scale_factor=1.0, mode="nearest")
        return self.head(F.gelu(self.last(torch.cat([x, y], 1)))).mean((2, 3))

    def masks(self, kept):
        return {name: kept[name] for name in self.groups if name != "a"} | {"norm": kept["a"]}


class Raw(nn.Module):
    """Parameters without layers, a layer that runs twice, and layers that share their filters."""

    groups = MappingProxyType({"filters": 8, "weight": 12})

    def __init__(self):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.scale, self.shift = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(1))
        self.again, self.twin = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.twin.weight = self.again.weight
        self.weight, self.bias = nn.Parameter(torch.randn(12, 8 * 64)), nn.Parameter(torch.ones(12))
        self.tap, self.last_tap = nn.Identity(), nn.Identity()
        self.head = nn.Linear(12, CLASSES)
        self.alias = self.head

    def forward(self, x):
        x = self.tap(F.conv2d(x, self.filters, padding=1) * self.scale + self.shift)
        for layer in (self.again, self.again, self.twin):
            x = F.relu(layer(x)) + x
        x = x.permute(0, 2, 3, 1).permute(0, 3, 1, 2).reshape(x.shape[0], x.shape[1], -1)
        x = F.linear(x.view(x.shape[0], -1), self.weight, self.bias)
        return self.head(self.last_tap(x.relu_()))

    def masks(self, kept):
        trunk = dict.fromkeys(("tap", "again", "twin"), kept["filters"])
        return trunk | {"last_tap": kept["weight"]}


class Normed(nn.Module):
    """ConvNeXt's block (arXiv 2201.03545): layer norm mixes the trunk, but not the wide layer."""

    groups = MappingProxyType({"up": 32})

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up, self.act, self.down = nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(self.act(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))

    def masks(self, kept):
        # Channels are last here: (N, H, W, C).
        return {"act": kept["up"].reshape(1, 1, 1, -1)}


class Auxiliary(nn.Module):
    """A second head that reads the first layer through a dropout, only in training."""

    groups = MappingProxyType({"stem": 8, "wide": 12})

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.head, self.second = nn.Linear(12, CLASSES), nn.Linear(8, CLASSES)
        self.dropout = nn.Dropout2d(0.0)

    def forward(self, x):
        x = F.dropout(self.dropout(F.relu(self.stem(x))), 0.0, training=self.training)
        logits = self.head(F.hardswish(self.wide(x)).mean((2, 3)))
        return logits + self.second(x.mean((2, 3))) if self.training else logits

    def masks(self, kept):
        return dict(kept)


def _resnet(model, kept=None):
    """The groups of a registered ResNet, or its masks; a stage's first block makes its trunk."""
    groups, masks = {}, {}
    if not isinstance(model, ServerResNet):
        groups["extractor.0"] = 16
        masks["extractor.1"] = "extractor.0"
    for path, block in model.named_modules():
        if isinstance(block, Basic):  # its output is added to the stem's
            groups[f"{path}.conv1"] = 16
            masks |= {f"{path}.bn1": f"{path}.conv1", f"{path}.bn2": "extractor.0"}
        if isinstance(block, Bottleneck):
            for i in (1, 2):
                groups[f"{path}.conv{i}"] = block.conv1.out_channels
                masks[f"{path}.bn{i}"] = f"{path}.conv{i}"
            if isinstance(block.shortcut, nn.Sequential):
                trunk = f"{path}.conv3"
                groups[trunk] = 4 * block.conv1.out_channels
                masks[f"{path}.shortcut.1"] = trunk
            masks[f"{path}.bn3"] = trunk
    return groups if kept is None else {path: kept[group] for path, group in masks.items()}


def _fast(model, kept=None):
    """The groups of a FastCNN, or its masks; in a group of three, the first and last are added."""
    groups, masks = {}, {}
    for i, group in enumerate(model.groups):
        for j, conv in enumerate(group.convs):
            of = f"groups.{i}.convs.{0 if len(group.convs) > 2 and j == 2 else j}"
            groups[of] = conv.out_channels
            masks[f"groups.{i}.norms.{j}"] = of
    return groups if kept is None else {path: kept[group] for path, group in masks.items()}


SHAPES = {"caldas_cnn": (1, 12, 12), "allconv": (3, 10, 10), "resnet8": (3, 8, 8)}
PLAIN = {
    "caldas_cnn": {"conv1": 32, "conv2": 64, "fc1": 512},
    "allconv": {f"features.{i}": 96 if i < 6 else 192 for i in range(0, 16, 2)},
}
OWN = {
    kind.__name__: kind
    for kind in (
        MobileNet, DenseNet, PreActivation, Grouped, Perceptron, Decoder, Raw, Normed, Auxiliary,
    )
}  # fmt: skip
NAMES = (*models.names(), *OWN)
SMALL = ("caldas_cnn", "allconv", "resnet8", "resnet10", *OWN)


class Case(NamedTuple):
    model: nn.Module
    shape: tuple[int, int, int]
    groups: Mapping[str, int]
    masks: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def make(name):
    """A network in float64; all biases and batch norms differ from their initial values."""
    torch.manual_seed(0)
    if name in OWN:
        model, shape = OWN[name](), (3, 8, 8)
        groups, masks = model.groups, model.masks
    else:
        side = 16 if name.startswith("fastcnn") else 8  # it halves them three times
        shape = SHAPES.get(name, (16, side, side))
        model = models.build(name, classes=CLASSES, input_shape=shape)
        groups, masks = PLAIN.get(name), dict
        if groups is None:
            rule = _fast if isinstance(model, FastCNN) else _resnet
            groups, masks = rule(model), lambda kept: rule(model, kept)
    for tensor in model.double().state_dict().values():
        if tensor.ndim == 1:
            tensor.add_(0.3 * torch.rand_like(tensor))
        elif tensor.ndim == 4 and isinstance(
            model, FastCNN
        ):  # an identity on a dropped unit has no variance
            tensor.add_(0.1 * torch.rand_like(tensor))
    return Case(model, shape, groups, masks)


def weights(model):
    return {n: t.numpy().copy() for n, t in model.state_dict().items() if t.is_floating_point()}
