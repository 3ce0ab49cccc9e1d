"""An artifact matches its manifest, byte for byte, or it is refused."""

import hashlib
import json
from dataclasses import replace

import pytest

from wire.artifact import open_artifact
from wire.costs import LayerCost, total
from wire.errors import ArtifactError
from wire.manifest import Manifest

FILES = {
    "train.onnx": b"a training graph",
    "eval.onnx": b"an evaluation graph",
    "init.safetensors": b"weights",
}


def tensor(name, shape, dtype="float32", role="batch"):
    return {"name": name, "shape": shape, "dtype": dtype, "role": role}


def costs(*rows):
    """The two tables of a graph with one node for each row (name, phase, flops)."""
    keys = ("name", "phase", "flops")
    sizes = {"bytes": 100, "activation_bytes": 0, "nodes": 1}
    return {
        "layers": [{**dict(zip(keys, row, strict=True)), **sizes} for row in rows],
        "nodes": {
            "row": [*range(len(rows))],
            "flops": [row[2] for row in rows],
            "bytes": [100] * len(rows),
            "activation_bytes": [0] * len(rows),
        },
    }


def content():
    state = [
        tensor("w", [2, 3], role="parameter"),
        tensor("optim.momentum.w", [2, 3], role="optimizer"),
    ]
    x = tensor("x", [4, 3])
    given = [x, tensor("y", [4], "int64"), tensor("lr", [], role="setting")]
    metrics = [tensor("loss", [], role="metric"), tensor("correct", [], role="metric")]
    following = [tensor("next[0:6]", [6], role="parameter")]
    following += [tensor("next[6:12]", [6], role="optimizer")]
    return {
        "format": 2,
        "model": {"name": "m", "classes": 2, "input": [3], "keep_rate": 1.0},
        "task": "classify",
        "batch": 4,
        "micro_batches": 1,
        "memory": {"tensors": 1000, "process": 5000, "recomputed": 0},
        "preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "features": None,
        "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005},
        "graphs": {
            "train": {
                "file": "train.onnx", "flops": 9, "inputs": given + state,
                **costs(("fc", "forward", 3), ("fc", "backward", 6), ("optimizer", "update", 0)),
                "outputs": metrics + following,
            },
            "eval": {
                "file": "eval.onnx", "flops": 3, "inputs": [x, state[0]],
                **costs(("fc", "forward", 3)),
                "outputs": [tensor("logits", [4, 2], role="result")],
            },
        },
        "state": state,
        "producer": {"torch": "2"},
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            for name, data in FILES.items()
        },
    }  # fmt: skip


def encode(mapping):
    return json.dumps(mapping, sort_keys=True, separators=(",", ":")).encode()


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "manifest.json").write_bytes(encode(content()))
    return tmp_path


def test_manifest_keeps_its_bytes_and_its_digest():
    data = encode(content())
    manifest = Manifest.parse(data)
    assert manifest.to_bytes() == data
    assert manifest.digest == hashlib.sha256(data).hexdigest()
    assert [spec.name for spec in manifest.state_of("parameter")] == ["w"]


def test_whole_artifact_is_opened(folder):
    artifact = open_artifact(folder, hashlib.sha256(encode(content())).hexdigest())
    assert artifact.path("train") == folder / "train.onnx"
    assert artifact.weights == folder / "init.safetensors"
    with pytest.raises(ArtifactError, match="no 'extract' graph"):
        artifact.path("extract")


def test_changed_file_is_refused_by_name_and_digest(folder):
    (folder / "train.onnx").write_bytes(b"A training graph")
    expected = hashlib.sha256(FILES["train.onnx"]).hexdigest()
    with pytest.raises(ArtifactError, match=rf"train\.onnx: expected SHA-256 {expected}, got"):
        open_artifact(folder)
    assert open_artifact(folder, verify=False).manifest.batch == 4


def test_cut_or_missing_file_is_refused_even_unverified(folder):
    (folder / "eval.onnx").write_bytes(b"an")
    with pytest.raises(ArtifactError, match=r"eval\.onnx: expected 19 bytes, got 2; remove"):
        open_artifact(folder, verify=False)
    (folder / "eval.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"eval\.onnx: cannot be read"):
        open_artifact(folder, verify=False)


def test_another_artifact_than_ordered_is_refused(folder):
    with pytest.raises(ArtifactError, match=r"expected SHA-256 0000.*another artifact"):
        open_artifact(folder, "0" * 64)


def test_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"manifest\.json: cannot be read"):
        open_artifact(tmp_path)


def change(path, value):
    """The manifest with the value at a path changed; the value ... removes the key."""
    mapping = content()
    place = mapping
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return encode(mapping)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 1),
        (("format",), True),
        (("format",), "1"),
        (("surprise",), 1),
        (("task",), ...),
        (("task",), "steal"),
        (("batch",), 0),
        (("batch",), 4.0),
        (("batch",), 8),
        (("model", "classes"), 1),
        (("model", "classes"), 3),
        (("model", "input"), []),
        (("model", "input"), [0]),
        (("model", "input"), [1 << 20, 1 << 20]),
        (("model", "keep_rate"), 0.0),
        (("model", "name"), "a b"),
        (("preprocess", "mean"), [0.5]),
        (("preprocess", "std"), [0.25, 0.0, 1.0]),
        (("features",), [16, 32, 32]),
        (("optimizer", "name"), "adam"),
        (("optimizer", "momentum"), 1.5),
        (("graphs", "train", "file"), "../train.onnx"),
        (("graphs", "train", "file"), "/etc/passwd"),
        (("graphs", "train", "file"), "manifest.json"),
        (("graphs", "train", "file"), ".hidden"),
        (("graphs", "train", "file"), "a\\b.onnx"),
        (("graphs", "train", "file"), "eval.onnx"),
        (("graphs", "train", "flops"), -1),
        (("graphs", "train", "flops"), 10),
        (("graphs", "train", "layers"), []),
        (("graphs", "train", "layers", 0, "flops"), 4),
        (("graphs", "train", "layers", 0, "flops"), -3),
        (("graphs", "train", "layers", 0, "bytes"), 101),
        (("graphs", "train", "layers", 0, "activation_bytes"), 1),
        (("graphs", "train", "layers", 0, "nodes"), 2),
        (("graphs", "train", "layers", 0, "name"), "f c"),
        (("graphs", "train", "layers", 0, "name"), "fc" * 129),
        (("graphs", "train", "layers", 0, "phase"), "sideways"),
        (("graphs", "train", "layers", 0, "phase"), "backward"),
        (("graphs", "train", "layers"), costs(*3 * [("fc", "forward", 3)])["layers"]),
        (("graphs", "train", "nodes"), ...),
        (("graphs", "train", "nodes", "row"), [0, 1]),
        (("graphs", "train", "nodes", "row"), [0, 1, 3]),
        (("graphs", "train", "nodes", "row"), [0, 1, -1]),
        (("graphs", "train", "nodes", "row"), [0, 1, True]),
        (("graphs", "train", "nodes", "flops"), [6, 3, 0]),
        (("graphs", "train", "nodes", "flops"), [12, -3, 0]),
        (("graphs", "train", "nodes", "bytes", 2), 1 << 62),
        (("graphs", "train", "nodes", "bytes", 2), 100.0),
        (("graphs", "eval", "layers", 0, "phase"), "backward"),
        (("graphs", "eval"), ...),
        (("graphs", "train", "inputs"), []),
        (("graphs", "train", "inputs", 0, "shape"), [4, 4]),
        (("graphs", "train", "inputs", 1, "dtype"), "float32"),
        (("graphs", "train", "outputs", 2, "name"), "w.then"),
        (("graphs", "train", "outputs", 3, "name"), "next[0:6]"),
        (("graphs", "train", "outputs", 3, "name"), "next[5:11]"),
        (("graphs", "train", "outputs", 3, "name"), "next[9:15]"),
        (("graphs", "train", "outputs", 3, "name"), "next[12:18]"),
        (("graphs", "train", "outputs", 3, "name"), "next[6:13]"),
        (("graphs", "train", "outputs", 3, "name"), "next[06:12]"),
        (("graphs", "train", "outputs", 3, "name"), "next[-6:0]"),
        (("graphs", "train", "outputs", 3, "name"), "state[6:12]"),
        (("graphs", "train", "outputs", 3, "dtype"), "int64"),
        (("graphs", "train", "inputs", 4), tensor("state[7:13]", [6], role="optimizer")),
        (("graphs", "train", "inputs", 4), tensor("state[6:11]", [6], role="optimizer")),
        (("graphs", "train", "inputs", 4), tensor("state[12:6]", [6], role="optimizer")),
        (("state", 1, "name"), "next[0:6]"),
        (("micro_batches",), 0),
        (("micro_batches",), 2),
        (("micro_batches",), 3),
        (("memory", "tensors"), -1),
        (("memory", "tensors"), 5001),
        (("memory", "recomputed"), -1),
        (("memory", "recomputed"), 1 << 40),
        (("graphs", "train", "inputs", 4), tensor("next[6:12]", [6], role="optimizer")),
        (("graphs", "train", "inputs", 4), tensor("state[6:12]", [6], role="metric")),
        (("graphs", "train", "outputs", 3, "role"), "result"),
        (("state", 1, "name"), "optim.anchor.ghost"),
        (("state", 1), tensor("optim.anchor.w", [3, 2], role="optimizer")),
        (("graphs", "eval", "inputs", 1, "role"), "optimizer"),
        (("graphs", "eval", "inputs"), []),
        (("graphs", "eval", "outputs", 0, "shape"), [4, 3]),
        (("state", 0, "dtype"), "float64"),
        (("state", 0, "role"), "batch"),
        (("state", 0, "shape"), [-2, 3]),
        (("state", 0, "shape"), [1 << 40]),
        (("state", 1, "name"), "w"),
        (("state", 0, "name"), "w\n"),
        (("producer",), {"torch": 2}),
        (("files", "train.onnx", "sha256"), "0" * 63),
        (("files", "train.onnx", "bytes"), 0),
        (("files", "train.onnx", "bytes"), 1 << 50),
        (("files", "eval.onnx"), ...),
        (("files", "../escape"), {"sha256": "0" * 64, "bytes": 1}),
        (("files", "extra.bin"), {"sha256": "0" * 64, "bytes": 1}),
    ],
)
def test_hostile_manifest_is_refused(path, value):
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        Manifest.parse(change(path, value))


def test_a_batch_is_bounded_as_a_whole_whatever_its_micro_batches():
    mapping = content()
    mapping["batch"] = mapping["micro_batches"] = 1024
    mapping["model"]["input"] = [3, 8192, 8192]
    with pytest.raises(ArtifactError, match="a batch: shape"):
        Manifest.parse(encode(mapping))
    mapping["batch"] = mapping["micro_batches"] = 1 << 16
    with pytest.raises(ArtifactError, match="at most 1024"):
        Manifest.parse(encode(mapping))


def test_overlapping_and_distant_ranges_of_the_state_are_named():
    name = ("graphs", "train", "outputs", 3, "name")
    with pytest.raises(ArtifactError, match=r"'next\[0:6\]' and 'next\[5:11\]' overlap"):
        Manifest.parse(change(name, "next[5:11]"))
    with pytest.raises(ArtifactError, match=r"'next\[7:13\]' is no range of 12 state values"):
        Manifest.parse(change(name, "next[7:13]"))


def test_input_that_is_a_range_across_tensors_has_its_place_in_the_state():
    mapping = content()
    mapping["graphs"]["train"]["inputs"][3:] = [tensor("state[2:9]", [7], role="parameter")]
    manifest = Manifest.parse(encode(mapping))
    places = {spec.name: manifest.place_of(spec) for spec in manifest.graphs["train"].inputs}
    assert places == {"x": None, "y": None, "lr": None, "state[2:9]": 2}


def test_cost_table_says_which_sum_is_wrong():
    with pytest.raises(ArtifactError, match=r"flops: expected the sum of the layers' 9, got 10"):
        Manifest.parse(change(("graphs", "train", "flops"), 10))
    with pytest.raises(ArtifactError, match=r"add up to .*'fc'.*flops=3.*got .*'fc'.*flops=4"):
        Manifest.parse(change(("graphs", "train", "layers", 0, "flops"), 4))


def test_cost_table_is_limited():
    rows = [(f"l{i}", "forward", 0) for i in range((1 << 14) + 1)]
    mapping = content()
    mapping["graphs"]["eval"] |= {"flops": 0, **costs(*rows)}
    with pytest.raises(ArtifactError, match=r"layers: 16385 rows, limit 16384"):
        Manifest.parse(encode(mapping))
    mapping = content()
    mapping["graphs"]["eval"]["nodes"] = costs(*[("fc", "forward", 0)] * 65537)["nodes"]
    with pytest.raises(ArtifactError, match=r"columns of one length to 65536, got \[65537, 65537"):
        Manifest.parse(encode(mapping))


def test_cost_of_a_phase_is_that_of_its_layers():
    layers = Manifest.parse(encode(content())).graphs["train"].layers
    assert total(layers, "backward") == LayerCost("", "backward", 6, 100, 0, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format":2}',
        b" " * (5 << 20),
        encode(content()) + b"\n",
        encode(content()).replace(b'"batch":4', b'"batch":4,"batch":4'),
        encode(content()).replace(b"0.9", b"NaN"),
        json.dumps(content()).encode(),
    ],
    ids=range(11),
)
def test_bytes_that_are_no_canonical_manifest_are_refused(data):
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        Manifest.parse(data)


def test_class_names_are_in_the_manifest_only_where_there_are_any():
    manifest = Manifest.parse(json.dumps(content(), sort_keys=True, separators=(",", ":")).encode())
    assert b"class_names" not in manifest.to_bytes()
    names = tuple(f"class {i}" for i in range(manifest.model.classes))
    named = replace(manifest, model=replace(manifest.model, class_names=names))
    assert Manifest.parse(named.to_bytes()) == named
    with pytest.raises(ValueError, match=f"expected {len(names)}, one a class, got 1"):
        replace(manifest.model, class_names=("bolt",))
    decomposed = ("Schlu\u0308ssel", *names[1:])
    with pytest.raises(ValueError, match="normal form C"):
        replace(manifest.model, class_names=decomposed)
