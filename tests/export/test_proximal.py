"""FedProx's term pulls parameters toward their values at the order's start; mu = 0 disables it."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from ondevice.trainer import TrainStep
from tools.export import Adam, Sgd, export
from wire.manifest import ANCHOR

BATCH, STEPS = 4, 20


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Artifacts by (optimizer, micro-batches, whether they have the term), checked by export."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(128, 5)
    )
    artifacts = {}
    for optimizer in (Sgd(0, nesterov=False, weight_decay=0), Adam()):
        for parts in (1, 2):
            for proximal in (False, True):
                name = optimizer.settings().name
                artifacts[name, parts, proximal] = export(
                    module, name="net", classes=5, input_shape=(3, 6, 6), batch=BATCH,
                    task="classify", optimizer=optimizer, micro_batches=parts, proximal=proximal,
                    out=tmp_path_factory.mktemp("art") / "a",
                )  # fmt: skip
    return artifacts


def begin(artifact):
    """A state whose parameters differ from the artifact's, as after some training."""
    random = np.random.default_rng(1)
    state = load_file(artifact.weights)
    for spec in artifact.manifest.state_of("parameter"):
        noise = random.standard_normal(spec.shape, dtype=np.float32)
        state[spec.name] = state[spec.name] + 0.1 * noise
    return state


def train(artifact, state, *, mu, steps=STEPS, lr=0.01):
    random = np.random.default_rng(0)
    step = TrainStep(artifact, state, threads=1)
    step.inputs["lr"][...] = lr
    if "mu" in step.inputs:
        step.inputs["mu"][...] = mu
    losses = []
    for _ in range(steps):
        step.inputs["x"][...] = random.standard_normal((BATCH, 3, 6, 6))
        step.inputs["y"][...] = random.integers(0, 5, BATCH)
        step()
        losses.append(float(step.loss))
    return {name: array.copy() for name, array in step.state.items()}, losses


def distance(artifact, state, start):
    names = [spec.name for spec in artifact.manifest.state_of("parameter")]
    return np.sqrt(sum(np.square(state[n] - start[n]).sum() for n in names))


CASES = pytest.mark.parametrize(
    ("optimizer", "parts"), [("sgd", 1), ("sgd", 2), ("adam", 1), ("adam", 2)]
)


@CASES
def test_without_weight_the_term_is_not_there(compiled, optimizer, parts):
    plain, proximal = compiled[optimizer, parts, False], compiled[optimizer, parts, True]
    assert "mu" not in TrainStep(plain, begin(plain), threads=1).inputs
    expected, losses = train(plain, begin(plain), mu=0)
    state, proximal_losses = train(proximal, begin(proximal), mu=0)
    for name, array in expected.items():
        np.testing.assert_allclose(state[name], array, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(proximal_losses, losses, atol=1e-6)


@CASES
def test_weight_keeps_the_parameters_near_where_they_began(compiled, optimizer, parts):
    artifact = compiled[optimizer, parts, True]
    start = begin(artifact)
    free, _ = train(artifact, start, mu=0)
    pulled, _ = train(artifact, start, mu=50)
    assert 0 < distance(artifact, pulled, start) < 0.5 * distance(artifact, free, start)


@CASES
def test_anchors_are_the_state_given_and_not_the_artifacts_first_weights(
    compiled, optimizer, parts
):
    plain, artifact = compiled[optimizer, parts, False], compiled[optimizer, parts, True]
    start = begin(artifact)
    state, losses = train(artifact, start, mu=50)
    for spec in artifact.manifest.state_of("parameter"):
        np.testing.assert_array_equal(state[ANCHOR + spec.name], start[spec.name])
    # At the anchors the term and its gradient are 0, so the first step is as without the term.
    first, (loss,) = train(artifact, start, mu=50, steps=1)
    expected, (expected_loss,) = train(plain, begin(plain), mu=0, steps=1)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, array in expected.items():
        np.testing.assert_allclose(first[name], array, atol=1e-6, err_msg=name)
    assert losses[0] == loss


def test_loss_has_half_of_mu_times_the_squared_distance(compiled):
    plain, artifact = compiled["sgd", 2, False], compiled["sgd", 2, True]
    start = begin(artifact)
    after, _ = train(artifact, start, mu=0, steps=1, lr=0.5)
    _, losses = train(artifact, start, mu=8, steps=2, lr=0.5)
    _, without = train(plain, begin(plain), mu=0, steps=2, lr=0.5)
    term = 8 / 2 * distance(artifact, after, start) ** 2
    assert term > 0.01
    assert losses[1] - without[1] == pytest.approx(term, rel=1e-3)
