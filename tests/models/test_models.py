"""The networks are the published ones, to the parameter and the FLOP."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from models.resnet import DeviceResNet
from tools.export import export
from wire.errors import StillhouseError

STEM = 464
# Parameters and MFLOPs: DESIGN, section 2; resnet19 and resnet10 by the same rule 9n + 2, without
# the stem. A whole network adds the stem's 0.885 MFLOPs; a cut changes no network.
TABLE = {
    "resnet8": (10_586, 19.24),
    "resnet8-block1": (10_586, 19.24),
    "resnet8-block2": (10_586, 19.24),
    "resnet8-opponent": (10_586, 19.24),
    "resnet4": (STEM + 2 * (9 * 16 * 16 + 2 * 16) + 17 * 10, 10.32),
    "resnet6": (STEM + 4 * (9 * 16 * 16 + 2 * 16) + 17 * 10, 19.76),
    "resnet10": (127_178, 39.85),
    "resnet19": (219_914, 66.59),
    "resnet55": (590_858, 173.5),
    "resnet109": (1_147_274, 334.0),
    "resnet11": (STEM + 127_178, 40.74),
    "resnet20": (STEM + 219_914, 67.47),
    "resnet56": (STEM + 590_858, 174.4),
    "resnet110": (STEM + 1_147_274, 334.9),
    "fastcnn6-32": (495_488, 75.50),
    "fastcnn6-64": (1_967_872, 283.1),
    "fastcnn9-64": (3_185_536, 396.4),
    "fastcnn9-128": (12_711_680, 1547.7),
    "caldas_cnn": (1_663_370, 24.55),
    "allconv": (1_369_738, 541.6),
}


@pytest.mark.parametrize("name", models.names())
def test_network_has_the_published_size(name):
    parameters, mega = TABLE[name]
    model = models.build(name, classes=10).eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        logits = model(torch.zeros(1, *models.input_shape(name)))
    assert logits.shape == (1, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert flops.get_total_flops() / 1e6 == pytest.approx(mega, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "shape", "extractor"),
    [
        ("resnet4", (16, 32, 32), STEM),
        ("resnet6", (16, 32, 32), STEM),
        ("resnet8", (16, 32, 32), STEM),
        ("resnet8-block1", (64, 32, 32), STEM + 4_928),
        ("resnet8-block2", (64, 32, 32), STEM + 4_928 + 4_544),
    ],
)
def test_device_half_hands_out_its_feature_map(name, shape, extractor):
    model = models.build(name, classes=10).eval()
    assert isinstance(model, models.SplitModel)
    assert sum(p.numel() for p in model.extractor.parameters()) == extractor
    x = torch.randn(2, 3, 32, 32)
    features, logits = model.extract(x)
    assert features.shape == (2, *shape)
    assert features.min() >= 0
    assert torch.equal(logits, model(x))
    assert torch.equal(features, model.extractor(x))
    server = models.build("resnet10", classes=10, input_shape=shape).eval()
    assert server(features).shape == (2, 10)


@pytest.mark.parametrize(("channels", "stem"), [(3, 16), (3, 24), (3, 32), (1, 16)])
def test_an_opponent_stem_has_filters_with_their_opposites_and_mirror_images(channels, stem):
    filters = DeviceResNet(4, channels, opponent=True, stem=stem).extractor[0].weight.detach()
    assert len(filters) == stem
    assert torch.equal(filters[stem // 2 :], -filters[: stem // 2])
    flat = filters.flatten(1)
    assert torch.linalg.matrix_rank(flat) == stem // 2
    apart = torch.cdist(filters.flip(3).flatten(1), flat)
    assert apart.amin(1).max() < 1e-5
    assert sorted(apart.argmin(1).tolist()) == list(range(stem))


def test_an_opponent_stem_of_too_many_channels_is_refused():
    with pytest.raises(ValueError, match="stem: expected up to 16 channels, got 24"):
        DeviceResNet(4, 1, opponent=True, stem=24)


@pytest.mark.parametrize("name", ["resnet8-block1", "resnet8-block2"])
def test_deeper_cut_is_the_same_network(name):
    x, logits = torch.randn(2, 3, 32, 32), []
    for each in ("resnet8", name):
        torch.manual_seed(5)
        logits.append(models.build(each, classes=10).eval()(x))
    assert torch.equal(*logits)


@pytest.mark.parametrize("name", ["resnet4", "resnet6", "resnet8-block1", "resnet8-block2"])
def test_device_network_is_compiled(name, tmp_path):
    torch.manual_seed(0)
    shape = (3, 8, 8)
    module = models.build(name, classes=10, input_shape=shape)
    artifact = export(
        module, name=name, classes=10, input_shape=shape, batch=4, out=tmp_path / "art"
    )
    planes = 64 if "block" in name else 16
    assert artifact.manifest.features == (planes, 8, 8)
    assert set(artifact.manifest.graphs) == {"train", "eval", "extract"}


@pytest.mark.parametrize("name", ["resnet10", "resnet19", "resnet55", "resnet109"])
def test_server_half_takes_the_feature_map(name):
    assert models.input_shape(name) == (16, 32, 32)
    assert not isinstance(models.build(name, classes=10), models.SplitModel)


@pytest.mark.parametrize(("name", "half"), [("resnet11", "resnet10"), ("resnet20", "resnet19")])
def test_whole_network_is_the_stem_and_the_server_half(name, half):
    whole = models.build(name, classes=10).eval()
    assert not isinstance(whole, models.SplitModel)
    stem = models.build("resnet8", classes=10).eval().extractor
    server = models.build(half, classes=10).eval()
    whole.extractor.load_state_dict(stem.state_dict())
    whole.rest.load_state_dict(server.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(whole(x), server(stem(x)))


def test_emnist_network_has_the_wide_hidden_layer():
    assert models.build("caldas_cnn", classes=62).fc1.out_features == 2048


def test_same_seed_gives_same_weights():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(models.build("resnet8", classes=10).state_dict())
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def test_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(StillhouseError, match="did you mean 'resnet55'"):
        models.build("resnet_55", classes=10)
    with pytest.raises(StillhouseError, match="known are: resnet8"):
        models.input_shape("?")


def test_allconv_refuses_images_too_small_for_its_unpadded_filter():
    model = models.build("allconv", classes=10, input_shape=(3, 9, 9))
    assert model(torch.zeros(1, 3, 9, 9)).shape == (1, 10)
    with pytest.raises(StillhouseError, match=r"9 pixels a side or more, got \(3, 8, 9\)"):
        models.build("allconv", classes=10, input_shape=(3, 8, 9))


@pytest.mark.parametrize(("classes", "shape"), [(1, None), (10, (3, 2, 2)), (10, (3, 32))])
def test_impossible_size_is_refused(classes, shape):
    with pytest.raises(StillhouseError, match="expected"):
        models.build("resnet8", classes=classes, input_shape=shape)


def test_a_frozen_extractor_stays_as_it_is():
    model = models.build("resnet8", classes=4, input_shape=(3, 8, 8))
    models.freeze(model)
    copied = copy.deepcopy(model).train()
    before = {n: t.clone() for n, t in copied.state_dict().items()}
    step = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], 0.1)
    copied(torch.randn(6, 3, 8, 8)).sum().backward()
    step.step()
    moved = {n for n, t in copied.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert not any(n.startswith("extractor.") for n in moved)
    assert copied.blocks.training
    assert not copied.extractor.training


@pytest.mark.parametrize("cut", ["resnet8", "resnet8-block1", "resnet8-block2"])
def test_halves_begin_as_what_they_are_of_a_whole_network(cut):
    torch.manual_seed(1)
    whole, device = models.build("resnet20", classes=10), models.build(cut, classes=10)
    server = models.build("resnet19", classes=10)
    for module in whole.modules():  # a trained network's statistics are not 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    weights = {n: t for n, t in whole.state_dict().items() if "num_batches" not in n}
    blocks = sum(n.startswith(("rest.stages.0.", "rest.stages.1.")) for n in weights)
    assert models.inherit(device, weights) == 5 + blocks
    assert models.inherit(server, weights) == len(weights) - 5
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        h = whole.eval().extractor(x)
        assert torch.equal(server.eval()(h), whole(x))
        layers = torch.nn.Sequential(device.extractor, device.blocks).eval()
        assert torch.equal(layers(x), whole.rest.stages[1](whole.rest.stages[0](h)))


def test_what_does_not_fit_stays_as_it_is():
    whole = models.build("resnet11", classes=10).state_dict()
    other = models.build("resnet10", classes=7)
    assert models.inherit(other, whole) == len(other.state_dict()) - 2  # fc
    assert torch.equal(
        other.state_dict()["stages.2.conv2.weight"], whole["rest.stages.2.conv2.weight"]
    )
    small = models.build("resnet4", classes=10)  # its blocks are not bottlenecks
    assert models.inherit(small, whole) == len(small.extractor.state_dict())
    assert models.inherit(models.build("allconv", classes=10), whole) == 0
