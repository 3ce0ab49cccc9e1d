"""A graph with anything that no artifact of ours has is refused before ONNX Runtime sees it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch import nn

from ondevice import graphs
from ondevice.trainer import Inference, TrainStep
from tools.export import Sgd, export
from tools.export.graphs import program
from wire.errors import ArtifactError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return export(
        model, name="small", classes=3, input_shape=(3, 8, 8), batch=2, optimizer=Sgd(0.9),
        out=tmp_path_factory.mktemp("artifact") / "artifact",
    )  # fmt: skip


INFO = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
OUT = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])


def model(*nodes, initializers=(), functions=(), opsets=()):
    graph = helper.make_graph([*nodes], "g", [INFO], [OUT], [*initializers])
    opsets = [helper.make_opsetid(domain, 1 if domain else 18) for domain in ("", *opsets)]
    return helper.make_model(
        graph, ir_version=9, opset_imports=opsets, functions=functions
    ).SerializeToString()


def external(name="w"):
    tensor = numpy_helper.from_array(np.ones(2, np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


RELU = helper.make_node("Relu", ["x"], ["y"])
INNER = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "inner", [], [OUT])
TEXT = helper.make_tensor("w", TensorProto.STRING, [1], [b"text"])


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (model(helper.make_node("Loop", ["", "", "x"], ["y"], body=INNER)), "an operator 'Loop'"),
        (model(helper.make_node("If", ["x"], ["y"], then_branch=INNER)), "an operator 'If'"),
        (model(helper.make_node("Relu", ["x"], ["y"], odd=INNER)), "a graph or a sparse tensor"),
        (model(helper.make_node("Relu", ["x"], ["y"], odd=[INNER])), "a graph or a sparse tensor"),
        (model(helper.make_node("Relu", ["x"], ["y"], domain="evil")), "of domain 'evil'"),
        (model(helper.make_node("Inverse", ["x"], ["y"], domain="com.microsoft")), "'Inverse'"),
        (model(helper.make_node("StringConcat", ["x", "x"], ["y"])), "'StringConcat'"),
        (model(RELU, initializers=[external()]), "a tensor in another file"),
        (model(helper.make_node("Pad", ["x"], ["y"], odd=external())), "a tensor in another file"),
        (model(helper.make_node("Pad", ["x"], ["y"], odd=[external()])), "a tensor in another"),
        (model(RELU, initializers=[TEXT]), "it has text"),
        (model(RELU, functions=[helper.make_function(
            "evil", "Relu", ["x"], ["y"], [RELU], [helper.make_opsetid("", 18)])]), "functions"),
        (model(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING)), "it has text"),
        (model(), "0 nodes"),
        (b"", "0 nodes"),
        (b"\xff\xff", "expected an ONNX graph"),
    ],
)  # fmt: skip
def test_what_no_artifact_of_ours_has_is_refused(content, found):
    with pytest.raises(ArtifactError, match=f"^here: .*{found}"):
        graphs.check(content, "here")


def test_what_is_exported_is_accepted(artifact):
    for graph in artifact.manifest.graphs.values():
        graphs.check((artifact.folder / graph.file).read_bytes(), "here")
    state = load_file(artifact.weights)
    TrainStep(artifact, state, threads=1)()
    Inference(artifact, "eval", state, threads=1)()


def test_a_graph_that_is_changed_is_not_run(artifact, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(artifact.folder, folder)
    (folder / "eval.onnx").write_bytes(model(RELU, initializers=[external()]))
    changed, state = replace(artifact, folder=folder), load_file(artifact.weights)
    with pytest.raises(ArtifactError, match=r"eval\.onnx: it has a tensor in another file"):
        Inference(changed, "eval", state, threads=1)
    (folder / "eval.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"eval\.onnx: cannot be read \(No such file"):
        Inference(changed, "eval", state, threads=1)


def test_a_graph_is_never_taken_for_onnxruntimes_own_format(artifact, tmp_path):
    """Bytes with its mark, within a field that the check skips: they are read as ONNX, or not."""
    folder = tmp_path / "artifact"
    shutil.copytree(artifact.folder, folder)
    path = folder / "eval.onnx"
    marked = b"\x7a\x85\x00\x00ORTM"
    path.write_bytes(marked + path.read_bytes())
    state = load_file(artifact.weights)
    graphs.check(path.read_bytes(), "here")
    run = Inference(replace(artifact, folder=folder), "eval", state, threads=1)
    run()
    assert run.outputs["logits"].shape == (2, 3)


def test_the_compiler_writes_no_operator_that_devices_refuse(artifact, monkeypatch):
    monkeypatch.setattr(program, "STANDARD", program.STANDARD - {"Conv"})
    with pytest.raises(AssertionError, match=r"devices refuse \['Conv'\]: add it"):
        export(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3)), name="small",
            classes=3, input_shape=(3, 8, 8), batch=2, out=artifact.folder.parent / "other",
        )  # fmt: skip
