"""Batch norm of a widening 1x1 convolution, by the second moments of its input, is PyTorch's."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.export.compare import assert_same, compiled
from tests.export.programs import compiler
from tools.export import export
from tools.export.graphs.graph import Graph
from tools.export.lower import trace

# As many pixels as a power of two: their reciprocal, a float32 attribute of a node, is exact.
SHAPE = (4, 4, 4, 8)


class Widening(nn.Module):
    """A 1x1 convolution from 4 to 16 channels and its batch norm, on scale * x + shift."""

    def __init__(self, *, bias=False, scale=1.0, shift=0.0, use="alone"):
        super().__init__()
        self.scale, self.shift, self.use = scale, shift, use
        self.conv, self.bn = nn.Conv2d(4, 16, 1, bias=bias), nn.BatchNorm2d(16)
        self.bn.num_batches_tracked = None  # the counter of batches is not part of the state

    def forward(self, x):
        y = self.conv(x * self.scale + self.shift)
        if self.use == "evaluated":
            self.bn.eval()
        z = self.bn(y)
        if self.use == "beside":
            return z + torch.tanh(y)
        if self.use == "two norms":
            return z * F.batch_norm(y, None, None, training=True)
        return z


def forwarded(module):
    """Output and running statistics of a forward pass, compiled and in PyTorch's float64.

    The running variance is the batch's own (momentum 1), unbiased.
    """
    module.bn.momentum = 1.0
    state = dict(module.named_parameters()) | dict(module.named_buffers())

    def forward(x, *flat):
        named = dict(zip(state, (t.clone() for t in flat), strict=True))
        y = functional_call(module, named, (x,))
        return [y, named["bn.running_mean"], named["bn.running_var"]]

    torch.manual_seed(0)
    inputs = [torch.randn(8, 4, 16, 16), *(t.detach().clone() for t in state.values())]
    got = compiled(Graph(), trace(forward, inputs, module.train()), inputs)
    return got, [t.detach().numpy() for t in forward(*(t.double() for t in inputs))]


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("use", ["alone", "beside", "two norms", "evaluated"])
def test_widening_convolution_with_batch_norm_however_it_is_used(use, bias):
    assert_same(Widening(use=use, bias=bias), SHAPE)


@pytest.mark.parametrize("side", [2, 3, 8])
def test_strided_and_padded_convolution_is_not_taken_for_a_plain_one(side):
    # With a stride of 2 and a padding of 1 an image of 2 or 3 pixels keeps its size.
    module = nn.Sequential(nn.Conv2d(4, 16, 1, 2, 1, bias=False), nn.BatchNorm2d(16))
    module[1].num_batches_tracked = None
    assert_same(module, (4, 4, side, side))


class Classifier(nn.Module):
    """An ordinary convolution, the widening one, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.wide = Widening(bias=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.wide(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("frozen", ["wide.conv.weight", "wide.bn.weight", "wide.bn", "first"])
def test_block_that_is_partly_frozen_is_compiled_and_equal_to_pytorch(tmp_path, frozen):
    module = Classifier()
    parts = [n for n, _ in module.named_parameters() if f"{n}.".startswith(f"{frozen}.")]
    for name in parts:
        module.get_parameter(name).requires_grad_(requires_grad=False)
    artifact = export(
        module, name="net", classes=5, input_shape=(3, 8, 8), batch=4, task="classify",
        out=tmp_path / "art",
    )  # fmt: skip
    names = {spec.name for spec in artifact.manifest.state}
    assert all(name in names and f"optim.momentum.{name}" not in names for name in parts)


def test_the_output_of_the_convolution_is_not_there():
    """One product makes the normalised output; no other tensor that wide is made and normalised."""
    program = compiler(Classifier(), (3, 8, 8), batch=4, classes=5).train()
    wide = [n.op for n in program.nodes if program.specs[n.outputs[0]].shape == (4, 16, 8, 8)]
    layers = {n.place.layer for n in program.nodes if n.op == "Conv"}
    assert "wide.conv" in layers
    assert "BatchNormalization" not in wide
    assert wide.count("Conv") == 1


def test_input_with_a_mean_of_a_few_deviations_costs_no_digits():
    assert_same(Widening(shift=3.0), SHAPE)


def test_large_mean_keeps_the_variance():
    # Second moments minus the squared mean would be off by 3 % here.
    (y, mean, variance), (true_y, true_mean, true_variance) = forwarded(Widening(shift=300.0))
    # Sums of four products of about 300, in float32's 24 bits: the error is 5e-5 over 25 seeds.
    np.testing.assert_allclose(mean, true_mean, rtol=0, atol=1.5e-4)
    np.testing.assert_allclose(variance, true_variance, rtol=1e-5)
    np.testing.assert_allclose(y, true_y, atol=2e-4)


@pytest.mark.parametrize("level", [0.0, 3.0, -300.0])
def test_constant_input_has_no_variance_and_gives_no_nan(level):
    (y, mean, variance), (_, true_mean, _) = forwarded(Widening(scale=0.0, shift=level))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(mean, true_mean, rtol=1e-6, atol=1e-5)
    assert (variance >= 0).all()
    # Only rounding remains: products of the level with itself, to float32's 24 bits.
    assert variance.max() <= level**2 * 2**-40
    assert np.abs(y).max() <= 0.05


def test_running_mean_includes_the_bias_of_the_convolution():
    module = Widening(bias=True, scale=0.0)
    with torch.no_grad():
        module.conv.bias.copy_(torch.arange(16.0))
    mean = forwarded(module)[0][1]
    np.testing.assert_allclose(mean, np.arange(16.0), atol=1e-5)
