"""What an order needs is pulled once; an artifact on disk is used only while it is intact."""

import os
import shutil

import pytest

import models
from edge_agent import supply
from edge_agent.supply import Shelf
from tools.export import export
from wire.errors import ArtifactError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(
        models.build("resnet8", classes=5), name="resnet8", classes=5, input_shape=(3, 32, 32),
        batch=4, out=tmp_path_factory.mktemp("artifact") / "a",
    )  # fmt: skip


@pytest.fixture
def shelf(tmp_path, exported):
    shelf = Shelf(tmp_path)
    shutil.copytree(exported.folder, shelf.path(exported.digest))
    return shelf


def test_an_artifact_is_read_and_verified_once(shelf, exported, monkeypatch):
    verified = []
    check = supply.open_artifact
    monkeypatch.setattr(
        supply, "open_artifact", lambda *a, **k: verified.append(1) or check(*a, **k)
    )
    first = shelf.open(exported.digest)
    assert shelf.open(exported.digest) is first
    assert len(verified) == 1
    assert first.digest == exported.digest


@pytest.mark.parametrize("keep_size", [True, False])
def test_a_file_that_changes_later_is_found_out_and_the_folder_goes(shelf, exported, keep_size):
    shelf.open(exported.digest)
    graph = shelf.path(exported.digest) / "train.onnx"
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content if keep_size else content[:-100])
    with pytest.raises(ArtifactError, match=r"train\.onnx: expected"):
        shelf.open(exported.digest)
    assert not shelf.has(exported.digest)


def test_a_file_that_is_swapped_for_another_of_the_same_time_is_found_out(shelf, exported):
    shelf.open(exported.digest)
    graph = shelf.path(exported.digest) / "train.onnx"
    stat = graph.stat()
    other = graph.with_suffix(".other")
    other.write_bytes(bytes(stat.st_size))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(graph)
    with pytest.raises(ArtifactError, match=r"train\.onnx: expected"):
        shelf.open(exported.digest)


def test_what_lies_there_from_before_is_verified_by_the_next_process(shelf, exported):
    shelf.open(exported.digest)
    graph = shelf.path(exported.digest) / "train.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ArtifactError):
        Shelf(shelf.folder).open(exported.digest)


def test_an_artifact_that_is_not_there_says_so(shelf):
    with pytest.raises(ArtifactError, match="cannot be read"):
        shelf.open("00" * 32)
