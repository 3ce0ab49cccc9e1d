"""The networks are the published ones, to the parameter and the FLOP."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from wire.errors import StillhouseError

# DESIGN, section 2; resnet19 and resnet10 by the same rule 9n + 2, less the stem.
TABLE = {
    "resnet8": (10_586, 19.24),
    "resnet10": (127_178, 39.85),
    "resnet19": (219_914, 66.59),
    "resnet55": (590_858, 173.5),
    "resnet109": (1_147_274, 334.0),
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


def test_device_half_hands_out_its_feature_map():
    model = models.build("resnet8", classes=10).eval()
    assert isinstance(model, models.SplitModel)
    assert sum(p.numel() for p in model.extractor.parameters()) == 464
    x = torch.randn(2, 3, 32, 32)
    features, logits = model.extract(x)
    assert features.shape == (2, 16, 32, 32)
    assert torch.equal(logits, model(x))
    assert torch.equal(features, model.extractor(x))


@pytest.mark.parametrize("name", ["resnet10", "resnet19", "resnet55", "resnet109"])
def test_server_half_takes_the_feature_map(name):
    assert models.input_shape(name) == (16, 32, 32)
    assert not isinstance(models.build(name, classes=10), models.SplitModel)


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
        models.build("resnet56", classes=10)
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
