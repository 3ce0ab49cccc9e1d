"""Whole networks of every common kind: each exports, and export() itself compares with PyTorch.

They are small versions of published designs, so that each takes a second or two. Large versions
would only repeat the same operators.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from tools.export import Adam, Sgd, export

CLASSES = 5


class Inverted(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018, arXiv 1801.04381, figure 4)."""

    def __init__(self, inputs, outputs, stride, growth=3):
        super().__init__()
        wide = growth * inputs
        self.block = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.block(x) if self.shortcut else self.block(x)


def mobilenet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 8 * 8, 24), nn.ReLU(), nn.Linear(24, 16), nn.Tanh(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


class Transformer(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) of PyTorch's own layers."""

    def __init__(self, norm_first):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, 16))
        self.position = nn.Embedding(5, 16)
        layer = functools.partial(
            nn.TransformerEncoderLayer, 16, 4, 32, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=norm_first,
        )  # fmt: skip
        self.layers = nn.Sequential(layer(), layer())
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.layers(x + self.position(torch.arange(5)))
        return self.head(self.norm(x)[:, 0])


class Attention(nn.Module):
    """Multi-head attention by hand, with a mask, and a feed-forward part, each with a shortcut."""

    def __init__(self, width, heads, mask):
        super().__init__()
        self.heads, self.mask = heads, mask
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind()
        if self.mask == "causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.mask == "window":
            near = torch.ones(length, length).tril(1).triu(-1).bool()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Sequence(nn.Module):
    """Attention with each kind of mask over the rows of an image."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 12)
        masks = [None, "causal", "window"]
        self.blocks = nn.Sequential(*(Attention(12, 3, mask) for mask in masks))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        rows = x.permute(0, 2, 1, 3).flatten(2)
        return self.head(self.blocks(self.embed(rows)).mean(1))


class ConvNeXt(nn.Module):
    """ConvNeXt's block (Liu et al. 2022, arXiv 2201.03545, figure 4) with its layer scale."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """Squeeze-and-excitation, SiLU, hard swish and group norm, as in MobileNetV3 and similar."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.GroupNorm(3, 12), nn.SiLU())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1),
            nn.Hardsigmoid(),
        )  # fmt: skip
        self.last = nn.Sequential(nn.Conv2d(12, 8, 1), nn.GroupNorm(2, 8), nn.Hardswish())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.conv(x)
        x = self.last(x * self.squeeze(x))
        both = torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1)
        return self.head(both.flatten(1))


class UNet(nn.Module):
    """Downsampling, then three kinds of upsampling, with concat shortcuts (arXiv 1505.04597)."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            self._double(a, b) for a, b in [(3, 6), (6, 8), (8, 10), (10, 12)]
        )
        self.up = nn.ModuleList(self._double(a, b) for a, b in [(20, 10), (18, 8), (14, 6)])
        self.grow = nn.ConvTranspose2d(12, 10, 2, 2)
        self.head = nn.Conv2d(6, CLASSES, 1)

    @staticmethod
    def _double(inputs, outputs):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(outputs), nn.LeakyReLU(0.1),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.ELU(),
        )  # fmt: skip

    def forward(self, x):
        kept = []
        for block in self.down[:-1]:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.grow(self.down[-1](x))
        x = self.up[0](torch.cat([kept[2], x], 1))
        x = F.interpolate(x, scale_factor=2)
        x = self.up[1](torch.cat([kept[1], x], 1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
        x = self.up[2](torch.cat([kept[0], x], 1))
        return self.head(x).mean((2, 3))


class Recurrent(nn.Module):
    """A GRU over the rows of an image, and an LSTM cell over its outputs."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(24, 10, batch_first=True)
        self.cell = nn.LSTMCell(10, CLASSES)

    def forward(self, x):
        rows, _ = self.gru(x.permute(0, 2, 1, 3).flatten(2))
        state = None
        for row in rows[:, ::2].unbind(1):
            state = self.cell(row, state)
        return 3 * state[0]


class Shuffled(nn.Module):
    """ShuffleNet's parts (Zhang et al. 2017, arXiv 1707.01083) and Swin's patch merging."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.shuffle = nn.ChannelShuffle(2)
        self.second = nn.Conv2d(8, 8, 1, groups=2)
        self.merge = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.second(self.shuffle(F.mish(self.first(x)))).roll((1, -1), (2, 3))
        corners = [x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.merge(F.normalize(torch.cat(corners, 1), dim=1).mean((2, 3)))


NETWORKS = {
    "resnet8": (lambda: models.build("resnet8", classes=CLASSES), (3, 16, 16)),
    "caldas_cnn": (lambda: models.build("caldas_cnn", classes=CLASSES), (1, 28, 28)),
    "allconv": (lambda: models.build("allconv", classes=CLASSES), (3, 12, 12)),
    "mobilenet": (mobilenet, (3, 16, 16)),
    "mlp": (mlp, (3, 8, 8)),
    "transformer": (lambda: Transformer(norm_first=False), (3, 8, 8)),
    "transformer_norm_first": (lambda: Transformer(norm_first=True), (3, 8, 8)),
    "attention_by_hand": (Sequence, (3, 8, 8)),
    "convnext": (ConvNeXt, (3, 16, 16)),
    "gated": (Gated, (3, 16, 16)),
    "unet": (UNet, (3, 16, 16)),
    "recurrent": (Recurrent, (3, 8, 8)),
    "shuffled": (Shuffled, (3, 8, 8)),
}


@pytest.mark.parametrize("optimizer", [Sgd(), Adam()], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_of_every_common_kind_is_compiled_and_equal_to_pytorch(tmp_path, name, optimizer):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    artifact = export(
        make(), name=name, classes=CLASSES, input_shape=shape, batch=3, optimizer=optimizer,
        out=tmp_path / "art",
    )  # fmt: skip
    assert artifact.manifest.graphs["train"].flops > 2 * artifact.manifest.graphs["eval"].flops > 0
