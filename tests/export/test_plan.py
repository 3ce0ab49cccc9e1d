"""A memory budget: the smallest change that meets it, or an error with the least memory needed."""

import pytest
import torch
from torch import nn

import models
from tools.export import export
from wire.errors import ExportError

BATCH = 16


def resnet8(out, **changes):
    torch.manual_seed(0)
    settings = {"batch": BATCH, "task": "classify"} | changes
    return export(
        models.build("resnet8", classes=10), name="resnet8", classes=10, input_shape=(3, 32, 32),
        out=out, **settings,
    )  # fmt: skip


def small(norm=nn.BatchNorm2d, width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), norm(width), nn.Tanh(), nn.Flatten(), nn.Linear(16 * width, 5)
    )


def export_small(out, module=None, **changes):
    settings = {"classes": 5, "input_shape": (3, 6, 6), "batch": 4, "task": "classify"} | changes
    return export(module or small(), name="small", out=out, **settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return resnet8(tmp_path_factory.mktemp("plain") / "art").manifest


def test_budget_that_is_large_enough_changes_nothing(plain, tmp_path):
    assert (plain.micro_batches, plain.memory.recomputed) == (1, 0)
    assert 0 < plain.memory.tensors < plain.memory.process
    exact = resnet8(tmp_path / "art", memory_mb=plain.memory.process / 1e6 + 1).manifest
    assert exact.digest == plain.digest


def test_activations_are_computed_again_before_a_batch_is_split(plain, tmp_path):
    budget = plain.memory.process - 2_000_000
    manifest = resnet8(tmp_path / "art", memory_mb=budget / 1e6).manifest
    assert manifest.micro_batches == 1
    assert manifest.memory.recomputed > 0
    assert manifest.memory.process <= budget
    assert manifest.memory.tensors < plain.memory.tensors
    assert manifest.graphs["eval"] == plain.graphs["eval"]
    rows = (len(m.graphs["train"].nodes.row) for m in (manifest, plain))
    assert next(rows) == next(rows) + manifest.memory.recomputed


def test_batch_is_split_where_computing_again_is_not_enough(plain, tmp_path):
    budget = plain.memory.process - 0.6 * plain.memory.tensors
    manifest = resnet8(tmp_path / "art", memory_mb=budget / 1e6).manifest
    assert manifest.memory.process <= budget
    assert (manifest.batch, manifest.micro_batch) == (BATCH, BATCH // manifest.micro_batches)
    assert 1 < manifest.micro_batches < BATCH


def test_budget_that_is_too_small_is_refused_with_the_least_and_nothing_is_written(tmp_path):
    with pytest.raises(ExportError) as caught:
        export_small(tmp_path / "art", small(width=512), batch=8, memory_mb=60)
    message = str(caught.value)
    assert "small: a budget of 60 MB is too small: the agent alone takes 78 MB" in message
    assert "for a batch of 8 is " in message
    assert message.endswith("raise the budget or lower the batch")
    assert list(tmp_path.iterdir()) == []
    least = int(message.partition("for a batch of 8 is ")[2].partition(" MB at the peak")[0])
    manifest = export_small(
        tmp_path / "art", small(width=512), batch=8, memory_mb=least + 1
    ).manifest
    assert manifest.memory.process <= (least + 1) * 1e6


@pytest.mark.parametrize("parts", [3, 8, 0, -2])
@pytest.mark.parametrize("memory_mb", [None, 1000])
def test_number_of_micro_batches_that_does_not_divide_the_batch_is_refused(
    tmp_path, parts, memory_mb
):
    with pytest.raises(ExportError, match=rf"divides the batch of 4, got {parts}$"):
        export_small(tmp_path / "art", micro_batches=parts, memory_mb=memory_mb)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("memory_mb", [None, 1000])
def test_micro_batch_of_one_is_refused_with_a_batch_norm_by_its_place_only(tmp_path, memory_mb):
    with pytest.raises(ExportError, match=r"^small: '1' is a batch norm; with a batch of 1 it "):
        export_small(tmp_path / "art", micro_batches=4, memory_mb=memory_mb)
    assert list(tmp_path.iterdir()) == []
    module = small(lambda width: nn.GroupNorm(2, width))
    artifact = export_small(tmp_path / "art", module, micro_batches=4, memory_mb=memory_mb)
    assert artifact.manifest.micro_batch == 1


def test_batch_of_one_fits_a_budget(tmp_path):
    module = small(lambda width: nn.GroupNorm(2, width))
    manifest = export_small(tmp_path / "art", module, batch=1, memory_mb=1000).manifest
    assert (manifest.batch, manifest.micro_batches) == (1, 1)


def test_batch_is_split_no_less_than_was_asked_for(tmp_path):
    manifest = export_small(tmp_path / "art", micro_batches=2, memory_mb=1000).manifest
    assert manifest.micro_batches == 2
