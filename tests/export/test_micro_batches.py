"""A batch split into micro-batches is one optimizer step, with PyTorch's running statistics."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

import models
from ondevice.trainer import Inference, TrainStep
from tools.export import Adam, Sgd, export

BATCH = 12
SHAPE = (3, 8, 8)


class Small(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), norm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


def compiled(out, module, parts, **changes):
    settings = {"task": "distill", "batch": BATCH, "classes": 5, "input_shape": SHAPE} | changes
    return export(module, name="small", out=out, micro_batches=parts, **settings)


def batches(count, classes=5):
    random = np.random.default_rng(0)
    for _ in range(count):
        yield {
            "x": random.standard_normal((BATCH, *SHAPE), dtype=np.float32),
            "y": random.integers(0, classes, BATCH),
            "teacher": 3 * random.standard_normal((BATCH, classes), dtype=np.float32),
        }


def trained(artifact, *, lr, steps=4):
    """The state after some steps, and the loss and number of correct samples of each step."""
    step = TrainStep(artifact, load_file(artifact.weights), threads=1)
    metrics = []
    for batch in batches(steps):
        for name, value in (batch | {"lr": lr, "alpha": 0.7, "temperature": 2.0}).items():
            step.inputs[name][...] = value
        step()
        metrics.append((float(step.loss), float(step.correct)))
    return {name: array.copy() for name, array in step.state.items()}, np.array(metrics)


@pytest.mark.parametrize("optimizer", [Sgd(), Adam(weight_decay=0.01)], ids=["sgd", "adam"])
def test_without_batch_norm_micro_batches_give_what_the_whole_batch_gives(tmp_path, optimizer):
    module = Small(lambda width: nn.GroupNorm(2, width))
    whole = compiled(tmp_path / "1", module, 1, optimizer=optimizer)
    expected, expected_metrics = trained(whole, lr=0.05)
    start = load_file(whole.weights)
    assert np.abs(expected["fc.weight"] - start["fc.weight"]).max() > 0.01
    for parts in (2, 3, BATCH):
        artifact = compiled(tmp_path / str(parts), module, parts, optimizer=optimizer)
        assert artifact.manifest.micro_batch == BATCH // parts
        state, metrics = trained(artifact, lr=0.05)
        for name, array in expected.items():
            np.testing.assert_allclose(state[name], array, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(metrics[:, 0], expected_metrics[:, 0], atol=1e-5)
        np.testing.assert_array_equal(metrics[:, 1], expected_metrics[:, 1])


@pytest.mark.parametrize("parts", [2, 3])
def test_running_statistics_are_pytorchs_over_the_micro_batches_in_turn(tmp_path, parts):
    module = Small(nn.BatchNorm2d)
    artifact = compiled(tmp_path / "art", module, parts)
    state, metrics = trained(artifact, lr=0.0, steps=2)
    correct, losses = [], []
    for batch in batches(2):
        for images, labels in zip(
            np.split(batch["x"], parts), np.split(batch["y"], parts), strict=True
        ):
            logits = module.train()(torch.from_numpy(images))
            correct.append((logits.argmax(1).numpy() == labels).sum())
            losses.append(float(F.cross_entropy(logits, torch.from_numpy(labels)).detach()))
    for name in ("norm.running_mean", "norm.running_var"):
        expected = module.get_buffer(name).numpy()
        np.testing.assert_allclose(state[name], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(metrics[:, 1], np.reshape(correct, (2, parts)).sum(1))
    assert (metrics[:, 0] > np.reshape(losses, (2, parts)).mean(1)).all()  # plus the teacher's
    for name, parameter in module.named_parameters():
        np.testing.assert_array_equal(state[name], parameter.detach().numpy())


@pytest.mark.parametrize("optimizer", [Sgd(), Adam()], ids=["sgd", "adam"])
def test_every_graph_takes_a_micro_batch(tmp_path, optimizer):
    artifact = export(
        models.build("resnet8", classes=5, input_shape=(3, 16, 16)), name="resnet8", classes=5,
        input_shape=(3, 16, 16), batch=6, micro_batches=3, optimizer=optimizer,
        out=tmp_path / "art",
    )  # fmt: skip
    manifest = artifact.manifest
    assert (manifest.batch, manifest.micro_batches, manifest.micro_batch) == (6, 3, 2)
    for graph in manifest.graphs.values():
        assert next(s.shape for s in graph.inputs if s.name == "x") == (2, 3, 16, 16)
    start = load_file(artifact.weights)
    assert TrainStep(artifact, start, threads=1).inputs["x"].shape == (6, 3, 16, 16)
    extract = Inference(artifact, "extract", start, threads=1)
    assert extract.x.shape == (2, 3, 16, 16)
    assert extract.outputs["logits"].shape == (2, 5)
