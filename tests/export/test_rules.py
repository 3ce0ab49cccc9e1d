"""Every rule gives PyTorch's numbers, forward and backward, on the real ONNX Runtime."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.func import functional_call, vjp
from torch.nn import functional as F

from tools.export.cost import flops
from tools.export.graph import Graph
from tools.export.lower import lower, trace


def compiled(function, inputs, module):
    """What ONNX Runtime makes of a function of a list of tensors."""
    g = Graph()
    names = [f"in{i}" for i in range(len(inputs))]
    arguments = [g.input(n, t.shape, t.dtype) for n, t in zip(names, inputs, strict=True)]
    results = lower(g, trace(function, inputs, module), arguments)
    for number, value in enumerate(results):
        g.output(f"out{number}", value)
    model = g.program("rule").model()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    used = {i.name for i in model.graph.input}
    feed = {n: t.detach().numpy() for n, t in zip(names, inputs, strict=True) if n in used}
    return session.run(None, feed)


def assert_same(module, shape, *, tolerance=1e-5):
    """Output, input gradient, parameter gradients and buffers after one forward pass."""
    torch.manual_seed(0)
    module.train()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    x = torch.randn(shape)
    cotangent = torch.randn_like(module(x))
    own = [*parameters.values(), *buffers.values()]

    def function(x, cotangent, *flat):
        held = dict(zip([*parameters, *buffers], flat, strict=True))
        changed = {n: held[n].clone() for n in buffers}

        def forward(x, trained):
            return functional_call(module, {**trained, **changed}, (x,))

        y, back = vjp(forward, x, {n: held[n] for n in parameters})
        dx, grads = back(cotangent)
        return [y, dx, *grads.values(), *changed.values()]

    inputs = [x, cotangent, *(t.detach().clone() for t in own)]
    expected = function(*inputs)
    got = compiled(function, inputs, module)
    labels = ["y", "dx", *(f"d{n}" for n in parameters), *buffers]
    wanted = [tensor.detach().numpy() for tensor in expected]
    for label, want, have in zip(labels, wanted, got, strict=True):
        assert have.shape == want.shape, label
        np.testing.assert_allclose(
            have, want, atol=tolerance * max(1.0, np.abs(want).max()), rtol=0, err_msg=label
        )


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
        (nn.BatchNorm2d(4, momentum=0.3, eps=1e-3), (2, 4, 1, 1)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 5, 6)),
        (nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 5, 6)),
        (nn.BatchNorm1d(4), (8, 4)),
        (nn.BatchNorm1d(4), (8, 4, 5)),
        (nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 6)),
        (nn.GroupNorm(2, 4), (3, 4, 5, 6)),
        (nn.GroupNorm(2, 4, affine=False), (3, 4, 5, 6)),
        (nn.LayerNorm([5, 6]), (3, 4, 5, 6)),
        (nn.LayerNorm(6), (3, 6)),
    ],
    ids=repr,
)
def test_norm_and_its_statistics(module, shape):
    buffers = {n: b for n, b in module.named_buffers() if not b.is_floating_point()}
    for name in buffers:
        setattr(module, name, None)  # the counter of batches is no part of the state
    assert_same(module, shape)


def test_batch_norm_with_a_large_mean_keeps_its_variance():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.bn.num_batches_tracked = None

        def forward(self, x):
            return self.bn(x + 300)

    # The mean of squares less the squared mean would be off by 1 % here.
    assert_same(Shifted(), (4, 3, 8, 8), tolerance=1e-3)


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
        nn.LeakyReLU(0.1),
        nn.ELU(0.7),
        nn.SELU(),
        nn.CELU(),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Mish(),
        nn.Hardswish(),
        nn.Hardsigmoid(),
        nn.Hardtanh(-0.5, 0.7),
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
        nn.Upsample(scale_factor=2),
        nn.ZeroPad2d((1, 2, 0, 3)),
        nn.Identity(),
        nn.Dropout(0.0),
    ],
    ids=repr,
)
def test_activation_or_rearrangement(module):
    assert_same(module, (2, 4, 6, 9))


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
    ],
    ids=repr,
)
def test_pooling(module):
    assert_same(module, (2, 3, 9, 12))


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


def test_flops_are_those_of_the_nodes():
    g = Graph()
    x, w = g.input("x", (2, 6, 8, 8)), g.input("w", (4, 3, 3, 3))
    y = g.node("Conv", x, w, shape=(2, 4, 6, 6), group=2)
    z = g.node("Reshape", y, g.ints((8, 36)), shape=(8, 36))
    g.output("o", g.node("Gemm", z, z, shape=(36, 36), transA=1))
    assert flops(g.program("flops")) == 2 * (2 * 4 * 36 * 27) + 2 * (36 * 36 * 8)
