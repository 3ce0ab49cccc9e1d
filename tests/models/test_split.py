"""A network that is cut after a module computes the same; one that is not a chain is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models
from models import split
from tools.export import export
from wire.errors import StillhouseError

SHAPE, CLASSES = (3, 12, 16), 4


class Numbers(nn.Module):
    """Around the cut are sizes of the image, a branch on training, and an in-place operator."""

    def __init__(self, drop=0.3):
        super().__init__()
        self.drop = drop
        self.stem = nn.Conv2d(3, 6, 3, 2, padding=1)
        self.scale = nn.Parameter(torch.full((6, 1, 1), 2.0))
        self.register_buffer("shift", torch.ones(6, 1, 1), persistent=False)
        self.body = nn.ModuleDict({"a": nn.Conv2d(6, 5, 1), "norm": nn.BatchNorm2d(5)})
        self.fc = nn.Linear(5 * 12 * 16, CLASSES)

    def forward(self, x, scale=1.0):
        assert x.shape[1] == 3, "colour"
        n, _, height, width = x.shape
        y = self.stem(x) * 1.0
        y = F.relu(y, inplace=True) * self.scale + self.shift
        y = self.body["norm"](self.body["a"](y))
        if self.training and height > 4:
            y = F.dropout(y, self.drop)
        y = F.interpolate(y, size=(height, width)).to(x.dtype)
        return self.fc(y.view(n, 5 * height * width) * scale)


class InPlace(nn.Sequential):
    """The layers after the norm write into its output."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, CLASSES),
        )  # fmt: skip


class Skip(nn.Module):
    """It can be cut around its skip connection, not within; most kinds of `how` break the chain."""

    def __init__(self, how=""):
        super().__init__()
        self.how = how
        self.stem, self.first, self.second = (nn.Conv2d(i, 3, 3, padding=1) for i in (3, 3, 3))
        self.idle = nn.Conv2d(3, 3, 1)
        self.pool = nn.MaxPool2d(1)
        self.weight = nn.Parameter(torch.ones(3, 1, 1))
        self.fc = nn.Linear(3, CLASSES)
        if how == "tied":
            self.second.weight = self.stem.weight

    def forward(self, x):
        y = self.stem(x) * (self.weight if self.how == "parameter" else 1)
        y = y + self.second(F.relu(self.first(y)))
        if self.how == "twice":
            y = self.stem(y)
        if self.how == "image":
            y = y + x
        if self.how == "parameter":
            y = y * self.weight
        if self.how == "values" and y.sum() > 0:
            y = y * 2
        return self.fc(self.pool(y).mean((2, 3)))


def made(kind, *arguments):
    torch.manual_seed(0)
    return kind(*arguments)


def cut(model, path, name="net"):
    return split.SplitAt(model, split.find(model, path, SHAPE, name))


@pytest.mark.parametrize(
    ("kind", "path"),
    [(Numbers, "stem"), (Numbers, "body.a"), (Numbers, "body.norm"), (InPlace, "0"), (InPlace, "1"),
     (InPlace, "3"), (Skip, "stem"), (models.registry.DeviceResNet, "blocks.0")],
)  # fmt: skip
def test_both_parts_together_are_the_network(kind, path):
    whole = made(kind, *([CLASSES] if kind is models.registry.DeviceResNet else []))
    parts = cut(copy.deepcopy(whole), path)
    assert isinstance(parts, models.SplitModel)
    x = torch.randn(5, *SHAPE)
    taken = {}
    whole.get_submodule(path).register_forward_hook(
        lambda _module, _inputs, out: taken.update(h=out.clone())
    )
    for training in (True, False, True):
        whole.train(training), parts.train(training)
        torch.manual_seed(1)
        expected = whole(x.clone())
        torch.manual_seed(1)
        features, logits = parts.extract(x.clone())
        assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.allclose(features, taken["h"], atol=1e-5)
    own, origins = parts.state_dict(), parts.origins()
    idle = {"idle.weight", "idle.bias", "weight"}  # unused parameters
    assert {origins[key] for key in own} | idle == set(whole.state_dict()) | idle
    for key, tensor in own.items():  # including batch norm's statistics
        assert torch.allclose(tensor.float(), whole.state_dict()[origins[key]].float(), atol=1e-5)
    grown = copy.deepcopy(parts).train()
    grown(x).sum().backward()
    assert all(p.grad is not None for p in grown.parameters())


@pytest.mark.parametrize(
    ("how", "path", "reason"),
    [
        ("", "first", ("the output of operation 'mul' goes past it; it can be cut behind 'stem', "
         "'pool'")),
        ("image", "first", "the image itself goes past it|the output of operation 'mul'"),
        ("image", "stem", "the image itself goes past it; it can be cut behind 'pool'"),
        ("twice", "stem", "called 2 times in the forward pass, expected once"),
        ("tied", "stem", "tensor 'stem.weight' is used on both sides|tensor 'second.weight' is"),
        ("parameter", "second", "goes past it"),
        ("", "fc", r"its output is \(2, 4\), expected a feature map \(N, C, H, W\)"),
        ("", "idle", "called nowhere in the forward pass"),
        ("", "frist", "there is no module 'frist' .did you mean 'first'"),
        ("", "", "there is no module ''"),
        ("values", "stem", "the forward pass of the network, or one .* cannot be followed"),
    ],
)  # fmt: skip
def test_what_is_no_chain_there_is_refused_with_the_reason(how, path, reason):
    with pytest.raises(StillhouseError, match=reason) as fault:
        split.find(made(Skip, how), path, SHAPE, "net")
    assert str(fault.value).startswith(f'net: split = "{path}": ')


def test_a_network_without_any_cut_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 16, CLASSES))
    with pytest.raises(StillhouseError, match="it can be cut nowhere"):
        split.find(model, "1", SHAPE, "net")
    assert split.places(model, SHAPE) == []


def test_a_feature_map_is_not_what_the_rest_makes_of_it():
    parts = cut(made(InPlace), "1").eval()
    x = torch.randn(2, *SHAPE)
    features, _ = parts.extract(x)
    assert features.min() < 0
    assert torch.equal(features, parts.extractor(x))


def test_a_frozen_extractor_stays_in_training_and_in_copies():
    parts = cut(made(InPlace), "1")
    models.freeze(parts)
    moved = copy.deepcopy(parts).train()
    before = {key: tensor.clone() for key, tensor in moved.state_dict().items()}
    step = torch.optim.SGD([p for p in moved.parameters() if p.requires_grad], 0.1)
    moved(torch.randn(6, *SHAPE)).sum().backward()
    step.step()
    changed = {key for key, tensor in moved.state_dict().items() if not tensor.equal(before[key])}
    assert changed
    assert all(key.startswith("rest.") for key in changed)


@pytest.mark.parametrize(("kind", "path"), [(lambda: Numbers(drop=0), "body.a"), (InPlace, "1")])
def test_it_is_compiled_with_its_feature_map(kind, path, tmp_path):
    """`export` runs the graphs against PyTorch before it writes."""
    artifact = export(
        cut(made(kind), path), name="net", classes=CLASSES, input_shape=SHAPE, batch=3,
        out=tmp_path / "art",
    )  # fmt: skip
    assert artifact.manifest.features == ((6, 10, 14) if kind is InPlace else (5, 6, 8))


def test_it_begins_with_the_weights_of_the_network_uncut():
    whole, parts = made(InPlace), cut(InPlace(), "1")
    assert models.inherit(parts, whole.state_dict()) == len(whole.state_dict())
    x = torch.randn(2, *SHAPE)
    assert torch.equal(parts.eval()(x), whole.eval()(x))


def test_a_name_may_carry_the_path():
    parts = models.build("allconv@features.3", classes=CLASSES, input_shape=(3, 10, 12))
    shape = models.try_out(parts, "allconv", classes=CLASSES, shape=(3, 10, 12))
    assert shape == (96, 10, 12)
    torch.manual_seed(4)
    again = models.build("allconv@features.3", classes=CLASSES, input_shape=(3, 10, 12))
    torch.manual_seed(4)
    whole = models.build("allconv", classes=CLASSES, input_shape=(3, 10, 12)).state_dict()
    assert all(t.equal(whole[again.origins()[key]]) for key, t in again.state_dict().items())
