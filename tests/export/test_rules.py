"""Every rule gives PyTorch's numbers, forward and backward, in float32 and in float64."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.export.compare import assert_same
from tools.export.graphs.cost import flops
from tools.export.graphs.graph import Graph
from tools.export.rules import RULES


@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 5)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_convolution_of_any_kernel_stride_and_padding(kernel, stride, padding):
    assert_same(nn.Conv2d(3, 4, kernel, stride, padding), (2, 3, 11, 12))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 12, 3, 2, 1, groups=6),
        nn.Conv2d(6, 9, 3, 1, 2, dilation=2, groups=3),
        nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), dilation=(2, 3), groups=2),
        nn.Conv2d(6, 8, 1, 2, groups=2),
        nn.Conv2d(6, 8, 1, (2, 3), padding=1),
        nn.Conv2d(6, 4, 3, padding="same", padding_mode="zeros"),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2),
    ],
    ids=repr,
)
def test_convolution_with_groups_dilation_or_transposed(module):
    assert_same(module, (2, 6, 9, 10))


def test_convolution_of_one_and_three_axes():
    assert_same(nn.Conv1d(3, 4, 5, 2, 2), (2, 3, 17))
    assert_same(nn.Conv3d(2, 3, 3, 2, 1), (2, 2, 5, 6, 7))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm2d(4), (3, 4, 5, 6)),
        (nn.BatchNorm2d(4, momentum=0.3, eps=2**-10), (2, 4, 1, 1)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 5, 6)),
        (nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 6)),
        (nn.BatchNorm1d(4), (8, 4)),
        (nn.BatchNorm1d(4), (8, 4, 5)),
        (nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 6)),
        (nn.GroupNorm(2, 4), (3, 4, 5, 6)),
        (nn.GroupNorm(2, 4, affine=False), (3, 4, 5, 6)),
        (nn.LayerNorm([5, 6]), (3, 4, 5, 6)),
        (nn.LayerNorm(6), (3, 6)),
        (nn.RMSNorm(6, eps=2**-10), (3, 6)),
        (nn.RMSNorm([5, 6], eps=2**-10, elementwise_affine=False), (3, 4, 5, 6)),
    ],
    ids=repr,
)
def test_norm_and_its_statistics(module, shape):
    buffers = {n: b for n, b in module.named_buffers() if not b.is_floating_point()}
    for name in buffers:
        setattr(module, name, None)  # the counter of batches is not part of the state
    assert_same(module, shape)


def test_batch_norm_with_a_large_mean_keeps_its_variance():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.bn.num_batches_tracked = None

        def forward(self, x):
            return self.bn(x + 300)

    # The mean of squares minus the squared mean would be off by 1 % here.
    assert_same(Shifted(), (4, 3, 8, 8))


def test_batch_norm_that_runs_twice_updates_its_statistics_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.bn.num_batches_tracked = None

        def forward(self, x):
            return self.bn(2 * self.bn(x) + 1)

    assert_same(Shared(), (4, 3, 8, 8))


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(0.125),
        nn.ELU(0.75),
        nn.CELU(),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Mish(),
        nn.Hardtanh(-0.5, 0.7),
        nn.Hardtanh(0, 1),
        nn.Hardtanh(-1, 0.5),
        nn.Hardtanh(),
        nn.Softplus(),
        nn.Softsign(),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.LogSigmoid(),
        nn.PReLU(4),
        nn.Softmax(1),
        nn.Flatten(),
        nn.Unflatten(1, (2, 2)),
        nn.PixelShuffle(2),
        nn.PixelUnshuffle(3),
        nn.ZeroPad2d((1, 2, 0, -1)),
        nn.Hardshrink(0.4),
        nn.Softshrink(0.3),
        nn.Tanhshrink(),
        nn.Threshold(0.1, 2.0),
        nn.Softplus(2, 0.5),
        nn.GLU(1),
        nn.LogSoftmax(2),
        nn.ReflectionPad2d((1, 0, 2, 3)),
        nn.ReplicationPad2d((1, 2, 0, 3)),
        nn.Unfold(2, stride=2),
        nn.Unfold(3, dilation=2, padding=1),
        nn.ChannelShuffle(2),
        nn.LocalResponseNorm(3),
        nn.LPPool2d(2, 2),
        nn.Identity(),
        nn.Dropout(0.0),
    ],
    ids=repr,
)
def test_activation_or_rearrangement(module):
    assert_same(module, (2, 4, 6, 9))


@pytest.mark.parametrize("module", [nn.SELU(), nn.Hardswish(), nn.Hardsigmoid()], ids=repr)
def test_activation_with_a_float32_slope(module):
    assert_same(module, (2, 4, 6, 9), digits=7)


@pytest.mark.parametrize(
    "module",
    [
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=(3, 1)),
        nn.Upsample(scale_factor=1.7),
        nn.Upsample(size=(4, 20)),
        nn.Upsample(scale_factor=2, mode="nearest-exact"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(size=(5, 9), mode="bilinear", align_corners=True),
        nn.Upsample(scale_factor=1.7, mode="bilinear"),
        nn.Upsample(scale_factor=(2, 3), mode="bicubic"),
    ],
    ids=repr,
)
def test_resizing(module):
    assert_same(module, (2, 3, 6, 9))


def test_resizing_of_one_and_three_axes():
    assert_same(nn.Upsample(scale_factor=2), (2, 3, 7))
    assert_same(nn.Upsample(size=9, mode="linear"), (2, 3, 7))
    assert_same(nn.Upsample(scale_factor=(2, 1, 3)), (2, 3, 2, 3, 4))
    assert_same(nn.Upsample(scale_factor=2, mode="trilinear"), (2, 3, 2, 3, 4))


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3),
        nn.MaxPool2d((2, 3)),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d(3, 1, 1, dilation=2),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, 3),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d((2, 3), (1, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((3, 3)),
        nn.AdaptiveAvgPool2d((4, 7)),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveMaxPool2d((3, 4)),
    ],
    ids=repr,
)
def test_pooling(module):
    assert_same(module, (2, 3, 9, 12))


def test_pooling_of_one_and_three_axes():
    assert_same(nn.MaxPool1d(3, 2, 1), (2, 3, 9))
    assert_same(nn.AvgPool1d(2), (2, 3, 9))
    assert_same(nn.AdaptiveAvgPool1d(4), (2, 3, 9))
    assert_same(nn.MaxPool3d(2, ceil_mode=True), (2, 3, 4, 5, 6))
    assert_same(nn.MaxPool3d(3, 2, 1, dilation=2), (2, 3, 6, 7, 8))
    assert_same(nn.AvgPool3d(3, 2, 1, count_include_pad=False), (2, 3, 4, 5, 6))


def test_max_unpooling_reads_the_places_of_the_maxima():
    class Unpool(nn.Module):
        def forward(self, x):
            return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)

    assert_same(Unpool(), (2, 3, 6, 8))


def test_max_pooling_gives_the_gradient_of_a_tie_to_the_first():
    class Flat(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.relu(x - 2), 2)

    assert_same(Flat(), (2, 3, 8, 8))


def test_joins_slices_and_writes_in_place():
    class Juggler(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.scale = nn.Parameter(torch.randn(6))

        def forward(self, x):
            a, b = x.chunk(2, 1)
            y = torch.cat([self.fc(a), b * self.scale, a - b], 1)
            y = F.silu(y, inplace=True)
            y = torch.stack([y, y.flip(1)], 1).mean(1) / (1 + y.abs().amax(1, keepdim=True))
            return y.reshape(2, 9, 2).transpose(1, 2).sum(2) ** 2 + y[:, :1]

    assert_same(Juggler(), (2, 12))


def test_operators_that_write_in_place():
    class Writer(nn.Module):
        def forward(self, x):
            y = (x * 2).mul_(3).add_(1).div_(2)
            z = F.hardtanh(y.clone(), 0, 1, inplace=True).clamp_min_(0.1)
            z.masked_fill_(x > 1, 0.5)
            z += torch.ones(z.shape, dtype=torch.int64)
            return z

    assert_same(Writer(), (3, 6))


def test_what_pytorch_decomposes_into_writes_in_place():
    class Cosine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return F.cosine_similarity(x[:, None], self.weight[None], dim=-1)

    class Distance(Cosine):
        def forward(self, x):
            return F.pairwise_distance(x[:, None], self.weight[None])

    assert_same(Cosine(), (3, 6))
    assert_same(Distance(), (3, 6))


def test_defaults_of_a_rule_are_those_of_its_operator():
    """A trace leaves out arguments that equal the operator's defaults."""
    checked = 0
    for operator, rule in RULES.items():
        parameters = list(inspect.signature(rule).parameters.values())[2:]
        named = {parameter.name: parameter for parameter in parameters}
        in_order = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        open_ended = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for place, argument in enumerate(operator._schema.arguments):
            if not argument.has_default_value():
                continue
            if argument.kwarg_only:
                parameter = named.get(argument.name)
            else:
                parameter = in_order[place] if place < len(in_order) else None
            if parameter is None:
                assert open_ended, f"{operator} has {argument.name}, which its rule does not take"
                continue
            stated = argument.default_value
            same = [stated]
            if isinstance(stated, list):  # otherwise one number for all axes, or None
                same += [*stated, tuple(stated), None]
            assert parameter.default in same, (
                f"{operator}: {argument.name} is {stated} by default, in its rule "
                f"{parameter.default}"
            )
            checked += 1
    assert checked > 50


def test_flops_are_those_of_the_nodes():
    g = Graph()
    x, w = g.input("x", (2, 6, 8, 8)), g.input("w", (4, 3, 3, 3))
    y = g.node("Conv", x, w, shape=(2, 4, 6, 6), group=2)
    z = g.node("Reshape", y, g.ints((8, 36)), shape=(8, 36))
    g.output("o", g.node("Gemm", z, z, shape=(36, 36), transA=1))
    assert flops(g.program("flops")) == 2 * (2 * 4 * 36 * 27) + 2 * (36 * 36 * 8)
