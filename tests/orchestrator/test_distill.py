"""Server training has the paper's loss, is repeatable, and uses all devices' samples."""

import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from orchestrator.config import ServerConfig
from orchestrator.training import distill, optimizers
from orchestrator.training import loss as losses
from orchestrator.training.samples import Samples, Source
from orchestrator.training.shards import Shard

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
    got = losses.mean(z_s, y, z_c, alpha=0.7, temperature=3.0)
    assert got == pytest.approx(float(ce + 0.7 * 9 * kl))
    assert losses.mean(z_s, y, z_c, alpha=0.0, temperature=3.0) == pytest.approx(float(ce))


def train(shards, seed=0, config=CONFIG):
    torch.manual_seed(0)
    model = models.build("resnet10", classes=3, input_shape=(16, 8, 8))
    step = optimizers.make_optimizer(model, config)
    samples = Samples([*map(Source, shards)], torch.device("cpu"))
    loss = distill.train(model, step, samples, config, seed=seed, progress=lambda *_: None)
    return model, step, loss


def test_training_lowers_the_loss_and_the_same_seed_gives_the_same_weights():
    shards = [shard(40, 0), shard(25, 1)]
    first, _, loss = train(shards)
    again, _, same = train(shards)
    assert loss == same
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    logits = distill.teach(
        first, Samples([*map(Source, shards)], torch.device("cpu")), range(40, 65), CONFIG
    )
    assert distill.accuracy(logits, torch.from_numpy(shards[1].labels)) > 0.6


@pytest.mark.parametrize(("crops", "sides"), [(True, [6, 6, 8, 8, 8]), (False, [8] * 5)])
def test_the_first_epochs_train_on_small_crops_where_all_maps_can_be_cropped(crops, sides):
    source = replace(Source(shard(16, 0)), fill=np.zeros(16, np.float32) if crops else None)
    source = replace(source, mirror=np.arange(16) if crops else None)
    config, seen = replace(CONFIG, epochs=5, batch=16, small_crops=0.4), []
    model = models.build("resnet10", classes=3, input_shape=(16, 8, 8))
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    step = optimizers.make_optimizer(model, config)
    samples = Samples([source], torch.device("cpu"))
    distill.train(model, step, samples, config, seed=0, progress=lambda *_: None)
    assert seen == [(side, side) for side in sides]


def test_predictions_are_in_the_order_of_the_samples():
    model, _, _ = train([shard(30, 0)])
    inputs = shard(21, 5).features
    whole = distill.predict(model, inputs, CONFIG)
    np.testing.assert_allclose(
        distill.predict(model, inputs, replace(CONFIG, eval_batch=4)), whole, atol=1e-5
    )
    np.testing.assert_allclose(distill.predict(model, inputs[7:8], CONFIG)[0], whole[7], atol=1e-5)


def test_bfloat16_learns_what_float32_does():
    shards = [shard(40, 0), shard(25, 1)]
    _, _, exact = train(shards)
    config = replace(CONFIG, precision="bfloat16")
    model, _, loss = train(shards, config=config)
    assert (loss != exact) == distill.computes_bfloat16()  # else it is float32, too
    assert loss == pytest.approx(exact, rel=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    logits = distill.predict(model, shards[1].features, config)
    assert logits.dtype == np.float32
    assert distill.accuracy(logits, torch.from_numpy(shards[1].labels)) > 0.6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_model_learns_the_same_and_keeps_its_names():
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which("g++") is None or not header.exists():
        pytest.skip("torch.compile wants a C++ compiler and Python's headers")
    shards = [shard(20, 0), shard(13, 1)]  # 4 batches of 8, and one sample that is left out
    plain, _, exact = train(shards)
    model, _, loss = train(shards, config=replace(CONFIG, compile=True))
    assert loss == pytest.approx(exact, rel=1e-3)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_single_left_over_sample_is_no_trouble():
    _, _, loss = train([shard(17, 0)])  # 8 + 8 + 1
    assert np.isfinite(loss)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_training_goes_on_after_a_checkpoint_as_if_it_had_not_stopped(optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    shards = [shard(24, 0)]
    whole, step, _ = train(shards, config=config)
    other = models.build("resnet10", classes=3, input_shape=(16, 8, 8))
    other.load_state_dict(whole.state_dict())
    other.to(memory_format=torch.channels_last)
    again = optimizers.make_optimizer(other, config)
    # As in files: in C order, whatever the order in memory was.
    kept = {name: np.array(array, order="C") for name, array in optimizers.slots(step).items()}
    optimizers.resume(again, kept)
    samples = Samples([*map(Source, shards)], torch.device("cpu"))
    for model, own in ((whole, step), (other, again)):
        distill.train(model, own, samples, config, seed=1, progress=lambda *_: None)
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_optimizer_survives_a_checkpoint():
    model, step, _ = train([shard(24, 0)])
    fresh = optimizers.make_optimizer(model, CONFIG)
    optimizers.resume(fresh, optimizers.slots(step))
    before, after = step.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    for number, slots in before.items():
        for name, value in slots.items():
            assert torch.equal(value, after[number][name])
