"""Whole modules: the compiled step equals PyTorch's; refused input leaves no files behind."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

import models
from ondevice.trainer import TrainStep
from tools.export import Adam, Sgd, export
from tools.export.rules import RULES
from wire.artifact import open_artifact
from wire.errors import ExportError


class Assorted(nn.Module):
    """Depthwise, dilated, strided and grouped convolutions, two norms, pools, a concat."""

    def __init__(self, classes=7):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2, bias=False)
        self.gn = nn.GroupNorm(4, 12)
        self.point = nn.Conv2d(20, 16, 1, 2, bias=False)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu6(self.bn(self.stem(x))), 3, 2, 1)
        x = torch.cat([F.hardswish(self.depth(x)), F.silu(self.gn(self.wide(x)))], 1)
        x = F.gelu(F.avg_pool2d(self.point(x), 2))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Plain(nn.Module):
    """The smallest network that trains, to which tests add parts."""

    def __init__(self, **parts):
        super().__init__()
        self.fc = nn.Linear(12, 5)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.fc(torch.tanh(x.flatten(1)))


def compile_plain(module, out, **changes):
    settings = {"classes": 5, "input_shape": (3, 2, 2), "batch": 4, "task": "classify"} | changes
    return export(module, name="plain", out=out, **settings)


@pytest.mark.parametrize("optimizer", [Sgd(), Adam(weight_decay=0.01)], ids=["sgd", "adam"])
def test_resnet8_is_compiled_and_equal_to_pytorch(tmp_path, optimizer):
    torch.manual_seed(0)
    out = tmp_path / "art"
    artifact = export(
        models.build("resnet8", classes=10), name="resnet8", classes=10, input_shape=(3, 32, 32),
        batch=4, optimizer=optimizer, out=out,
    )  # fmt: skip
    manifest = artifact.manifest
    assert manifest.features == (16, 32, 32)
    assert set(manifest.graphs) == {"train", "eval", "extract"}
    assert manifest.graphs["eval"].flops == 4 * 19_236_096
    assert 2.5 < manifest.graphs["train"].flops / manifest.graphs["eval"].flops < 3.3
    assert sum(int(np.prod(s.shape)) for s in manifest.state_of("parameter")) == 10_586
    assert [p.name for p in tmp_path.iterdir()] == ["art"]
    assert open_artifact(out, artifact.digest) == artifact


@pytest.mark.parametrize(
    ("module", "classes", "shape", "optimizer"),
    [
        (models.build("caldas_cnn", classes=10), 10, (1, 28, 28), Sgd(0.0, False, 0.0)),
        (Assorted(), 7, (3, 33, 31), Sgd(nesterov=False)),
        (Assorted(), 7, (3, 33, 31), Adam()),
    ],
    ids=["caldas_cnn", "assorted-sgd", "assorted-adam"],
)
def test_module_is_compiled_and_equal_to_pytorch(tmp_path, module, classes, shape, optimizer):
    before = {name: t.clone() for name, t in module.state_dict().items()}
    artifact = export(
        module, name="m", classes=classes, input_shape=shape, batch=6, task="classify",
        optimizer=optimizer, out=tmp_path / "art",
    )  # fmt: skip
    assert artifact.manifest.features is None
    assert {i.name for i in artifact.manifest.graphs["train"].inputs} >= {"x", "y", "lr"}
    assert "teacher" not in {i.name for i in artifact.manifest.graphs["train"].inputs}
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    initial = load_file(artifact.weights)
    assert set(initial) == {spec.name for spec in artifact.manifest.state}
    assert all(np.array_equal(initial[n], after[n]) for n in initial if n in after)


def test_step_learns_and_teacher_at_alpha_zero_is_ignored(tmp_path):
    torch.manual_seed(0)
    artifact = compile_plain(Plain(), tmp_path / "art", task="distill", optimizer=Sgd(0, False, 0))
    largest = np.finfo(np.float32).max
    wild = np.where(np.eye(4, 5) > 0, largest, -largest).astype(np.float32)
    losses = []
    for teacher in (np.zeros((4, 5), np.float32), wild):
        step = TrainStep(artifact, load_file(artifact.weights), threads=1)
        random = np.random.default_rng(0)
        feed = {"x": random.standard_normal((4, 3, 2, 2)), "y": np.arange(4), "teacher": teacher}
        for name, value in (feed | {"lr": 0.5, "alpha": 0, "temperature": 3}).items():
            step.inputs[name][...] = value
        losses.append([])
        for _ in range(60):
            step()
            losses[-1].append(float(step.loss))
    assert losses[0] == losses[1]
    assert losses[-1][-1] < 0.2 * losses[-1][0]
    assert step.correct == 4


def test_frozen_parameters_and_constant_buffers_stay_as_they_are(tmp_path):
    class Frozen(Plain):
        def __init__(self):
            super().__init__(shift=nn.Parameter(torch.ones(3, 1, 1), requires_grad=False))
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0])[:, None, None])
            self.register_buffer("scratch", torch.full((1,), 2.0), persistent=False)

        def forward(self, x):
            return super().forward((x + self.shift) * self.mask * self.scratch + self.order.sum())

    artifact = compile_plain(Frozen(), tmp_path / "art")
    roles = {spec.name: spec.role for spec in artifact.manifest.state}
    assert roles["shift"] == "parameter"
    assert roles["mask"] == "buffer"
    assert not {"order", "scratch", "optim.momentum.shift"} & set(roles)


def test_tied_weights_are_one_tensor(tmp_path):
    class Tied(Plain):
        def __init__(self):
            super().__init__(first=nn.Linear(12, 12))
            self.second = self.first

        def forward(self, x):
            return super().forward(self.second(torch.tanh(self.first(x.flatten(1)))))

    artifact = compile_plain(Tied(), tmp_path / "art", optimizer=Adam())
    names = [spec.name for spec in artifact.manifest.state_of("parameter")]
    assert names == ["fc.weight", "fc.bias", "first.weight", "first.bias"]


def test_same_seed_gives_the_same_manifest(tmp_path):
    manifests = []
    for name in "ab":
        torch.manual_seed(5)
        artifact = compile_plain(Plain(), tmp_path / name)
        manifests.append((artifact.folder / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert json.loads(manifests[0])["optimizer"] == {
        "momentum": 0.9, "name": "sgd", "nesterov": True, "weight_decay": 0.0005,
    }  # fmt: skip


def test_wrong_rule_is_found_and_named_and_leaves_nothing(tmp_path, monkeypatch):
    tanh = torch.ops.aten.tanh.default
    monkeypatch.setitem(RULES, tanh, lambda _g, _out, a: a * 0.999)
    with pytest.raises(ExportError, match=r"differs from PyTorch after 5 steps: .* difference"):
        compile_plain(Plain(), tmp_path / "art")
    assert list(tmp_path.iterdir()) == []


class Noisy(Plain):
    def forward(self, x):
        return super().forward(self.noise(x))


class Branching(Plain):
    def forward(self, x):
        return super().forward(x * 2 if x.sum() > 0 else x)


class Counting(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Noisy(noise=nn.Dropout(0.5)), r"bernoulli.p in module 'noise'.*set p=0"),
        (Noisy(noise=nn.BatchNorm2d(3, momentum=None)), r"'noise'.*give it a momentum"),
        (Branching(), r"fixed flow: no branch"),
        (Counting(), r"buffer 'seen' changes"),
        (Plain(idle=nn.Linear(2, 2)), r"'idle.weight' gets no gradient"),
        (Plain(odd=nn.Parameter(torch.zeros(1).double())), r"'odd' is torch.float64"),
        (Plain(lr=nn.Parameter(torch.zeros(1))), r"called 'lr'.*rename"),
        (Plain().double(), r"call \.float\(\)"),
        (Plain().requires_grad_(False), r"nothing to train"),
    ],
)  # fmt: skip
def test_module_that_cannot_be_compiled_is_refused_with_a_remedy(tmp_path, module, message):
    with pytest.raises(ExportError, match=message):
        compile_plain(module, tmp_path / "art")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 6}, r"expected logits of shape \(4, 6\), got \(4, 5\)"),
        ({"classes": 1}, r"2 classes or more"),
        ({"input_shape": (3, 5, 5)}, r"fails on a batch of shape \(4, 3, 5, 5\)"),
        ({"batch": 0}, r"batch of 1 or more"),
        ({"mean": (0.5,)}, r"a mean and a std for each of 3 channels"),
        ({"std": (1, 0, 1)}, r"std: expected numbers over 0"),
    ],
)
def test_wrong_setting_is_refused(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        compile_plain(Plain(), tmp_path / "art", **changes)
    assert list(tmp_path.iterdir()) == []


def test_batch_of_one_is_refused_with_batch_norm_only(tmp_path):
    with pytest.raises(ExportError, match="batch of 2 or more"):
        compile_plain(Noisy(noise=nn.BatchNorm2d(3)), tmp_path / "art", batch=1)
    assert compile_plain(Plain(), tmp_path / "art", batch=1).manifest.batch == 1


def test_existing_folder_is_not_overwritten(tmp_path):
    with pytest.raises(ExportError, match="exists"):
        compile_plain(Plain(), tmp_path)
