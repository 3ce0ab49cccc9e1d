"""A sub-model computes and learns the same as the network in which the dropped units are masked.

`networks` has the masks of each network, written out by hand.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from models import submodel
from models.units import Layout
from tests.models.networks import CLASSES, NAMES, OWN, SMALL, make, weights
from tools.export import export
from wire.errors import StillhouseError


def load(model, state):
    values = {key: torch.from_numpy(array) for key, array in state.items()}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return model


def mask(model, factors):
    """A copy of the model that multiplies the outputs of some modules by factors."""
    masked = copy.deepcopy(model)
    parts = dict(masked.named_modules())
    for path, factor in factors.items():

        def multiply(_, __, output, factor=factor):
            shape = (1, -1, *[1] * (output.ndim - 2)) if factor.ndim == 1 else factor.shape
            return output * factor.reshape(shape)

        parts[path].register_forward_hook(multiply)
    return masked


def gradients(model, x):
    F.cross_entropy(model(x), torch.arange(len(x)) % CLASSES).backward()
    named = model.named_parameters(remove_duplicate=False)
    return {key: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for key, p in named}


@pytest.mark.parametrize(
    ("name", "keep_rate"), [*((name, 0.75) for name in SMALL), *((name, 0.3) for name in NAMES)]
)
def test_sub_model_is_the_network_with_units_masked(name, keep_rate):
    model, shape, groups, masks = make(name)
    layout = submodel.layout(model, shape)
    assert layout.groups == groups
    units = submodel.choose(layout, keep_rate, "random", seed=1, round_=2, device="a")
    part = submodel.cut(weights(model), layout, units)
    narrow = load(submodel.narrow(model, layout, keep_rate), part)
    factors = {}
    for group, width in groups.items():
        assert len(units[group]) == max(1, round(keep_rate * width)) < width
        factors[group] = torch.zeros(width).index_fill(0, torch.from_numpy(units[group]), 1)
    masked = mask(model, masks(factors))
    x = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        logits = masked.eval()(x)
        np.testing.assert_allclose(narrow.eval()(x), logits, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(model.eval()(x), logits)
    # In training, the gradients and the statistics of batch norms are the same too.
    dense = gradients(narrow.train(), x)
    for key, gradient in submodel.cut(gradients(masked.train(), x), layout, units).items():
        np.testing.assert_allclose(dense[key], gradient, rtol=1e-8, atol=1e-10, err_msg=key)
    gathered = weights(narrow)
    for key, tensor in submodel.cut(weights(masked), layout, units).items():
        np.testing.assert_allclose(gathered[key], tensor, rtol=1e-10, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", SMALL)
def test_input_channels_and_logits_stay_at_the_lowest_keep_rate(name):
    model, shape, groups, _ = make(name)
    layout = submodel.layout(model, shape)
    assert set(submodel.kept_widths(layout, 1e-9).values()) == {1}
    narrow = submodel.narrow(model, layout, 1e-9)
    assert narrow(torch.zeros(2, *shape, dtype=torch.float64)).shape == (2, CLASSES)
    assert len(groups) > 0


SIZES = {
    nn.Linear: lambda p: (p.out_features, p.in_features),
    nn.Conv2d: lambda p: (p.out_channels, p.in_channels // p.groups),
    nn.ConvTranspose2d: lambda p: (p.in_channels, p.out_channels // p.groups),
    nn.BatchNorm2d: lambda p: (p.num_features,),
    nn.InstanceNorm2d: lambda p: (p.num_features,),
    nn.GroupNorm: lambda p: (p.num_channels,),
    nn.PReLU: lambda p: (p.num_parameters,),
}


@pytest.mark.parametrize("name", ["resnet8", *OWN])
def test_layers_of_a_narrow_network_say_how_wide_they_are(name):
    model, shape, _, _ = make(name)
    narrow = submodel.narrow(model, submodel.layout(model, shape), 0.5)
    for (path, old), new in zip(model.named_modules(), narrow.modules(), strict=True):
        if type(new) in SIZES:
            sizes = SIZES[type(new)](new)
            assert new.weight.shape[: len(sizes)] == sizes, path
        if isinstance(new, (nn.Conv2d, nn.GroupNorm)):
            wide, thin = (getattr(p, "out_channels", 0) or p.num_channels for p in (old, new))
            groups = [getattr(p, "groups", 0) or p.num_groups for p in (old, new)]
            # A group has as many channels as before.
            assert groups == [1, 1] or wide // groups[0] == thin // groups[1], path
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in model.parameters())


def test_paper_network_has_the_sizes_of_its_keep_rates():
    model = models.build("caldas_cnn", classes=10)
    layout = models.layout(model, (1, 28, 28))
    narrow = {rate: models.narrow(model, layout, rate) for rate in (1.0, 0.75, 0.5)}
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(narrow[1.0](x), model(x))
    # 26 a + (25 a + 1) b + (49 b + 1) c + 10 (c + 1) for a and b filters and c hidden units.
    counts = {rate: sum(p.numel() for p in part.parameters()) for rate, part in narrow.items()}
    assert counts == {1.0: 1_663_370, 0.75: 936_874, 0.5: 417_482}


def test_layers_that_share_their_weights_go_on_sharing():
    model, shape, _, _ = make("Raw")
    narrow = submodel.narrow(model, submodel.layout(model, shape), 0.5)
    assert narrow.twin.weight is narrow.again.weight
    assert narrow.alias is narrow.head


def test_channels_that_a_skip_connection_adds_are_one_group():
    layout = models.layout(models.build("resnet8", classes=10), (3, 32, 32))
    made = ["0.conv3.weight", "0.shortcut.0.weight", "0.shortcut.1.bias", "1.bn3.running_var"]
    axes = [layout.axes[f"blocks.{name}"][0] for name in made]
    axes += [layout.axes[name][1] for name in ("blocks.1.conv1.weight", "fc.weight")]
    assert len(np.unique(axes[0])) == layout.groups["blocks.0.conv3"] == 64
    for axis in axes:
        np.testing.assert_array_equal(axis, axes[0])


def test_flattened_channel_owns_its_places_in_the_next_layer():
    layout = models.layout(models.build("caldas_cnn", classes=10), (1, 28, 28))
    filters, inputs = layout.axes["conv2.weight"][0], layout.axes["fc1.weight"][1]
    np.testing.assert_array_equal(inputs, np.repeat(filters, 7 * 7))
    assert layout.axes["conv1.weight"][1:] == (None, None, None)
    assert layout.axes["fc2.bias"] == (None,)
    assert layout.shapes["fc1.weight"] == (512, 3136)


@pytest.mark.parametrize(("name", "shape"), [("caldas_cnn", (1, 12, 12)), ("resnet8", (3, 8, 8))])
def test_narrow_network_exports(tmp_path, name, shape):
    torch.manual_seed(0)
    model = models.build(name, classes=CLASSES, input_shape=shape)
    layout = models.layout(model, shape)
    artifact = export(
        models.narrow(model, layout, 0.5), name=name, classes=CLASSES, input_shape=shape, batch=4,
        task="classify", keep_rate=0.5, out=tmp_path / "art",
    )  # fmt: skip
    assert artifact.manifest.model.keep_rate == 0.5
    units = submodel.choose(layout, 0.5, "random", seed=1, round_=1, device="a")
    part = submodel.cut(weights(model), layout, units)
    expected = {s.name: s.shape for s in artifact.manifest.state_of("parameter", "buffer")}
    assert {key: tensor.shape for key, tensor in part.items()} == expected


MIXTURES = {
    "softmax": lambda x: x.softmax(1),
    "gate": lambda x: x * x.amax(1, keepdim=True),
    "pool": lambda x: F.max_pool2d(x.permute(0, 2, 3, 1), (1, 2)).permute(0, 3, 1, 2),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "shuffle_by_hand": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "half": lambda x: x.chunk(2, 1)[0],
    "slice": lambda x: x[:, :4],
    "look_up": lambda x: x[:, [3, 1, 2]],
    "gated_half": lambda x: F.glu(x, 1),
    "sum_up": lambda x: x.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x.movedim(1, 3), (8,)).movedim(3, 1),
    "neighbours": lambda x: F.local_response_norm(x, 3),
    "fixed_groups": lambda x: F.group_norm(x, 2),
    "fixed_filters": lambda x: F.conv2d(x, torch.ones(6, 4, 1, 1), groups=2),
    "products": lambda x: torch.einsum("nchw,ndhw->ncd", x, x).unsqueeze(2),
    "heads": lambda x: F.scaled_dot_product_attention(*3 * [x.unflatten(1, (2, 4)).flatten(3)])
    .reshape(x.shape),
}  # fmt: skip


class Mixed(nn.Module):
    """A layer whose channels are mixed, and one whose channels are not."""

    def __init__(self, mixture):
        super().__init__()
        self.mix = MIXTURES[mixture]
        self.stem = nn.Conv2d(3, 8, 3)
        width = self.mix(torch.zeros(1, 8, 2, 2)).shape[1]
        self.free, self.head = nn.Conv2d(width, 5, 1), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(F.relu(self.free(self.mix(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_cannot_be_followed_stays_whole(mixture):
    assert submodel.layout(Mixed(mixture), (3, 8, 8)).groups == {"free": 5}


class Fixed(nn.Module):
    """Its forward contains a fixed number in place of a width."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8 if fault == "factor" else 8 * 64, CLASSES)

    def forward(self, x):
        x = self.conv(x)
        if self.fault == "factor":
            return self.fc(x.sum((2, 3)) * (8 / x.shape[1]))
        return self.fc(x.view(-1, 8 * 64))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Fixed("view"), r"narrower, in its own forward: shape .* invalid .*torch.flatten\(x, 1\)"),
        (Fixed("factor"), r"logits that differ by .*; take widths from tensors"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 10)), r"module '1' \(Linear\): mat1 .*\(N, chan"),
        (nn.Sequential(nn.Flatten(2), nn.GRU(64, 4)), "it returns a tuple; expected a module"),
    ],
)
def test_network_that_cannot_be_cut_is_refused_with_a_remedy(model, words):
    with pytest.raises(StillhouseError, match=words):
        submodel.layout(model, (3, 8, 8))


def test_keep_rate_out_of_range_is_refused():
    with pytest.raises(StillhouseError, match="keep_rate: expected more than 0 and at most 1"):
        submodel.narrow(nn.Linear(1, 1), Layout({"g": 4}, {}, {}), 0.0)


def test_to_look_at_a_network_changes_neither_it_nor_the_random_numbers():
    model = models.build("resnet8", classes=10)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    narrow = models.narrow(model, models.layout(model, (3, 8, 8)), 0.5)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes == [m.training for m in narrow.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in narrow.parameters())
