"""The server's optimizers: Muon's update, slow weights, and learning rates over a whole run."""

import numpy as np
import pytest
import torch
from torch import nn

import models
from orchestrator.config import ServerConfig
from orchestrator.training.optimizers import (
    PULL_EVERY,
    Course,
    Muon,
    Schedule,
    SlowWeights,
    make_optimizer,
    orthogonal,
)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_an_update_of_muon_is_nearly_the_orthogonal_factor(shape):
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonal(left @ torch.diag(torch.linspace(1, 2, min(shape))) @ right, steps=6)
    sizes = torch.linalg.svdvals(found)
    assert 0.6 < sizes.min() <= sizes.max() < 1.3
    cosine = (found * (left @ right)).sum() / found.norm() / (left @ right).norm()
    assert cosine > 0.97


def test_muon_keeps_the_length_of_filters_and_moves_all_that_is_trained():
    torch.manual_seed(0)
    model = models.build("fastcnn6-32", classes=4, input_shape=(3, 16, 16)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = make_optimizer(model, ServerConfig(optimizer="muon", lr=0.1))
    for _ in range(2):
        step.zero_grad()
        model(torch.randn(8, 3, 16, 16)).square().sum().backward()
        step.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
        if parameter.ndim == 4:  # a row has length 1 on average, give or take two updates
            assert float(parameter.detach().norm()) == pytest.approx(
                len(parameter) ** 0.5, rel=0.15
            )


def test_beside_filters_muon_is_adam():
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 3)
    for model, step in (
        (one, Muon([*one.parameters()], 0.2)),
        (other, torch.optim.Adam(other.parameters(), 0.2 * 0.015)),
    ):
        for _ in range(3):
            step.zero_grad()
            model(x).square().mean().backward()
            step.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_slow_weights_follow_late_in_a_run_and_end_as_the_model():
    model = nn.Linear(2, 2)
    slow = SlowWeights(model)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    slow.pull(0.0)  # at the beginning of a run the model goes its own way
    assert torch.allclose(model.weight, first + 1)
    with torch.no_grad():
        model.weight += 1
    slow.pull(1.0)
    share = 1 - 0.95**PULL_EVERY
    assert torch.allclose(model.weight, first + 1 + share)
    with torch.no_grad():
        model.weight += 1
    slow.settle()
    assert torch.allclose(model.weight, first + 1 + share)


def rates(config: ServerConfig, rounds: int, batches: int = 4) -> list[float]:
    """The learning rate of each step of a run."""
    step = make_optimizer(nn.Linear(1, 1), config)
    found = []
    for round_ in range(1, rounds + 1):
        course = Schedule(config, step, round_, rounds, None).course
        found += [course.rate(e, i / batches) for e in range(course.epochs) for i in range(batches)]
    return found


def test_a_line_falls_over_the_epochs_of_all_rounds():
    config = ServerConfig(epochs=(1, 3, 0), lr=0.2, schedule="linear")
    np.testing.assert_allclose(rates(config, 5), 0.2 * (1 - np.arange(16) / 16))


def test_a_cosine_changes_by_epochs_of_equal_rounds_as_it_always_did():
    config = ServerConfig(epochs=2, lr=0.2, schedule="cosine")
    wanted = [0.1 * (1 + np.cos(np.pi * done / 6)) for done in range(6) for _ in range(4)]
    np.testing.assert_allclose(rates(config, 3), wanted)
    assert set(rates(ServerConfig(epochs=2, lr=0.2), 3)) == {0.2}


def test_a_later_round_than_those_listed_has_the_last_number_of_epochs():
    config = ServerConfig(epochs=(1, 4))
    assert [config.epochs_in(round_) for round_ in (1, 2, 3, 9)] == [1, 4, 4, 4]
    assert Course("linear", 1.0, 2, 3, 10).done(1.5) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("epochs", 0, "1 or more"),
        ("epochs", (), "not only of 0"),
        ("epochs", (0, 0), "not only of 0"),
        ("epochs", (-1, 2), "0 or more"),
        ("shift", 5, "shift: expected at most 4, got 5"),
        ("small_crops", 1.0, "small_crops: expected 0"),
        ("label_smoothing", 1.0, "label_smoothing: expected 0"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, text):
    with pytest.raises(ValueError, match=text):
        ServerConfig(**{key: value})
