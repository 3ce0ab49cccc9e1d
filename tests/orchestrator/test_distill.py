"""Server training: the loss of the paper, repeatable, on all devices' samples."""

import numpy as np
import pytest
import torch

import models
from orchestrator import distill
from orchestrator.config import ServerConfig
from orchestrator.shards import Shard
from orchestrator.strategies.fedgkt import _flat, _restore

CONFIG = ServerConfig(model="resnet10", epochs=2, batch=8)


def shard(n: int, seed: int, shape=(16, 8, 8)) -> Shard:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    features = rng.standard_normal((n, *shape)) + labels[:, None, None, None]
    logits = rng.standard_normal((n, 3)).astype(np.float32)
    return Shard(features.astype(np.float32), logits, labels)


def test_the_loss_is_the_papers():
    z_s, z_c, y = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.arange(6) % 4
    p_c, p_s = torch.softmax(z_c / 3, 1), torch.softmax(z_s / 3, 1)
    kl = (p_c * (p_c.log() - p_s.log())).sum(1).mean()
    ce = -torch.log_softmax(z_s, 1)[torch.arange(6), y].mean()
    got = distill.loss(z_s, y, z_c, alpha=0.7, temperature=3.0)
    assert got == pytest.approx(float(ce + 0.7 * 9 * kl))
    assert distill.loss(z_s, y, z_c, alpha=0.0, temperature=3.0) == pytest.approx(float(ce))


def train(shards, seed=0):
    torch.manual_seed(0)
    model = models.build("resnet10", classes=3, input_shape=(16, 8, 8))
    step = distill.optimizer(model, CONFIG)
    loss = distill.train(model, step, shards, CONFIG, seed=seed, progress=lambda *_: None)
    return model, step, loss


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_weights():
    shards = [shard(40, 0), shard(25, 1)]
    first, _, loss = train(shards)
    again, _, same = train(shards)
    assert loss == same
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    logits = distill.predict(first, shards[1].features, 16)
    assert distill.accuracy(logits, torch.from_numpy(shards[1].labels)) > 0.6


def test_predictions_are_in_the_order_of_the_samples():
    model, _, _ = train([shard(30, 0)])
    inputs = shard(21, 5).features
    whole = distill.predict(model, inputs, 64)
    np.testing.assert_allclose(distill.predict(model, inputs, 4), whole, atol=1e-5)
    np.testing.assert_allclose(distill.predict(model, inputs[7:8], 4)[0], whole[7], atol=1e-5)


def test_a_single_left_over_sample_is_no_trouble():
    _, _, loss = train([shard(17, 0)])  # 8 + 8 + 1
    assert np.isfinite(loss)


def test_the_optimizer_survives_a_checkpoint():
    model, step, _ = train([shard(24, 0)])
    fresh = distill.optimizer(model, CONFIG)
    _restore(fresh, {name.removeprefix("optimizer/"): a for name, a in _flat(step).items()})
    before, after = step.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    for number, slots in before.items():
        for name, value in slots.items():
            assert torch.equal(value, after[number][name])
