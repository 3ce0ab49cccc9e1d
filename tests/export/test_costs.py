"""The cost table of an artifact has PyTorch's counts, by the module's own layers."""

import copy
from functools import partial

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models
from tools.export import export
from tools.export.__main__ import main
from tools.export.graphs.cost import costs
from tools.export.graphs.graph import Graph
from tools.export.graphs.program import Place
from wire.artifact import open_artifact
from wire.costs import PHASES, LayerCost, total

BATCH = 2


class Separable(nn.Module):
    """Grouped, depthwise, strided, dilated and transposed convolutions; modules called oddly."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.group = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = F.silu(self.stem[0](x))  # not called through the Sequential that holds it
        x = self.up(self.group(F.relu(self.depth(x))))
        return self.b(F.relu(self.a(x.mean((2, 3)))))


NETS = {
    "resnet8": (models.build("resnet8", classes=10), (3, 32, 32)),
    "caldas_cnn": (models.build("caldas_cnn", classes=10), (1, 28, 28)),
    "separable": (Separable(), (3, 16, 12)),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The artifact of each net by its name."""
    return {
        name: export(
            module, name=name, classes=6 if name == "separable" else 10, input_shape=shape,
            batch=BATCH, out=tmp_path_factory.mktemp(name) / "art",
        )
        for name, (module, shape) in NETS.items()
    }  # fmt: skip


def counted(name):
    """PyTorch's FLOPs of one training step, by module: for the forward and the backward pass.

    Each module is counted separately, on its input in the net. In a whole net's backward pass, the
    counter mistakes one module's gradients for another's where paths join.
    """
    module, shape = NETS[name]
    forward, backward, hooks = {}, {}, []
    for path, part in module.train().named_modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            hooks.append(part.register_forward_hook(partial(count, path, forward, backward)))
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(BATCH, *shape)).sum().backward()
    for hook in hooks:
        hook.remove()
    in_modules = sum(forward.values()) + sum(backward.values())
    assert counter.get_total_flops() == 2 * in_modules  # once for the net, and once for its modules
    return forward, backward


def count(path, forward, backward, part, inputs, _):
    alone = copy.deepcopy(part)
    alone._forward_hooks.clear()
    x = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
    with FlopCounterMode(display=False) as counter:
        y = alone(x)
        forward[path] = counter.get_total_flops()
        y.sum().backward()
    backward[path] = counter.get_total_flops() - forward[path]


def flops(artifact, phase, graph="train"):
    layers = artifact.manifest.graphs[graph].layers
    return {layer.name: layer.flops for layer in layers if layer.phase == phase and layer.flops}


@pytest.mark.parametrize("name", NETS)
def test_evaluation_costs_what_pytorch_counts(compiled, name):
    module, shape = NETS[name]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(BATCH, *shape))
    assert compiled[name].manifest.graphs["eval"].flops == counter.get_total_flops()
    assert flops(compiled[name], "forward", "eval") == counted(name)[0]


@pytest.mark.parametrize("name", ["caldas_cnn", "separable"])
def test_forward_pass_of_training_costs_what_pytorch_counts_by_layer(compiled, name):
    assert flops(compiled[name], "forward") == counted(name)[0]


def padded_rows(conv, height):
    """Extra FLOPs of a weight gradient that sums over all rows of the padded image."""
    return 2 * conv.weight.numel() * BATCH * height * 2 * conv.padding[0]


def test_backward_pass_costs_what_pytorch_counts_by_layer(compiled):
    expected = counted("caldas_cnn")[1]
    # Neither side computes the images' gradient; conv1's one channel is not worth splitting.
    expected["conv2"] += padded_rows(NETS["caldas_cnn"][0].conv2, 14)
    assert flops(compiled["caldas_cnn"], "backward") == expected


def test_batch_norm_by_second_moments_adds_its_small_products(compiled):
    """The products in rules/pointwise.py: S, m m^T, W C, W m; backward W^T b W z and so on."""
    module = NETS["resnet8"][0]
    forward, backward = counted("resnet8")
    pixels = BATCH * 32 * 32
    for path, part in module.named_modules():
        if isinstance(part, nn.Conv2d) and part.out_channels >= 2 * part.in_channels:
            if part.kernel_size == (1, 1):
                wide, inner = part.out_channels, part.in_channels
                gram = inner * inner * pixels
                forward[path] += 2 * (gram + inner * inner + wide * inner * inner + wide * inner)
                mixed = inner * inner * wide
                backward[path] += 2 * (gram + mixed + 2 * wide * inner)
        elif isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3):
            backward[path] += padded_rows(part, 32)
    assert flops(compiled["resnet8"], "forward") == forward
    assert flops(compiled["resnet8"], "backward") == backward


def test_shared_weight_has_a_gradient_in_each_module_that_uses_it(compiled):
    backward = flops(compiled["separable"], "backward")
    assert backward["a"] == backward["b"] == 2 * 2 * BATCH * 6 * 6


@pytest.mark.parametrize("name", NETS)
def test_layers_are_the_modules(compiled, name):
    module = NETS[name][0]
    known = {path for path, _ in module.named_modules()} | {"loss", "optimizer"}
    phases = {}
    for layer in compiled[name].manifest.graphs["train"].layers:
        assert layer.name in known
        phases.setdefault(layer.name, set()).add(layer.phase)
    for path, part in module.named_modules():
        if next(part.parameters(recurse=False), None) is not None:
            assert phases[path] >= {"forward", "backward"}
    if name == "resnet8":
        assert "update" in phases[""]  # all running statistics are one vector
    assert phases["optimizer"] == {"update"}
    assert phases["loss"] == {"forward", "backward"}
    assert "stem" not in phases  # only the convolution in it ran


@pytest.mark.parametrize("graph", ["train", "eval", "extract"])
def test_table_has_a_row_for_every_node_of_the_file(compiled, graph):
    artifact = compiled["resnet8"]
    nodes = onnx.load(artifact.path(graph)).graph.node
    costs = artifact.manifest.graphs[graph].nodes
    assert [node.name for node in nodes] == [f"n{i}" for i in range(len(costs.row))]
    products = [node.op_type in {"Conv", "Gemm", "MatMul", "FusedMatMul"} for node in nodes]
    assert products == [size > 0 for size in costs.flops]


def test_manifest_stays_small(compiled):
    assert len(compiled["resnet8"].manifest.to_bytes()) < 60_000


def test_nothing_is_kept_without_a_backward_pass(compiled):
    layers = compiled["resnet8"].manifest.graphs["eval"].layers
    assert {layer.phase for layer in layers} == {"forward"}
    assert total(layers, "forward").activation_bytes == 0


def test_bytes_and_kept_activations_are_counted_where_they_are_made():
    g = Graph()
    x, w = g.input("x", (2, 3, 4, 4)), g.input("w", (5, 3, 1, 1))
    g.place = g.place_of_products = Place("conv")
    y = g.node("Conv", x, w, shape=(2, 5, 4, 4))
    g.place = Place("relu")
    z = g.node("Relu", y, shape=y.shape)
    flat = g.node("Reshape", z, g.ints((2, 80)), shape=(2, 80))
    g.output("flat", g.node("Reshape", z, g.ints((160,)), shape=(160,)))
    g.place = Place("relu", "backward")
    wide = g.node("Mul", flat, flat, shape=(2, 80))
    pick = [g.ints([n]) for n in (0, 1, 1)]
    g.output("part", g.node("Slice", wide, *pick, shape=(2, 1)))
    layers, _ = costs(g.program("costs"))
    size = 4 * 160
    assert layers == (
        LayerCost("conv", "forward", 2 * 160 * 3, 4 * (96 + 15) + size, 0, 1),
        # the ReLU, a view that moves nothing, and a view that is an output and so a copy
        LayerCost("relu", "forward", 0, 2 * size + 2 * size + 8, size, 3),
        # both factors are the same tensor; a slice reads as much as it writes, and its bounds
        LayerCost("relu", "backward", 0, 2 * size + 2 * 8 + 2 * 8, 0, 2),
    )


def test_command_prints_the_table(tmp_path, capsys):
    command = ["--model", "caldas_cnn", "--classes", "10", "--batch", "2"]
    assert main([*command, "--out", str(tmp_path / "art"), "--costs"]) == 0
    _, flops, memory, phases, heads, *rows = capsys.readouterr().out.splitlines()
    assert "MFLOPs a sample" in flops
    assert "everything kept, one batch" in memory
    assert phases.split() == list(PHASES)
    assert heads.split() == ["by", "sample", *["MFLOPs", "kB"] * 3, "kB", "kept"]
    assert len({len(row) for row in [heads, *rows]}) == 1
    graph = open_artifact(tmp_path / "art").manifest.graphs["train"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(table) == [
        *dict.fromkeys(layer.name or "(model)" for layer in graph.layers),
        "total",
    ]
    forward, backward = (total(graph.layers, phase) for phase in PHASES[:2])
    assert table["total"][0] == f"{forward.flops / 2e6:.3f}"
    assert table["total"][3] == f"{backward.bytes / 2e3:.3f}"
    assert table["total"][6] == f"{forward.activation_bytes / 2e3:.3f}"
    assert table["optimizer"][:5] == ["-"] * 5
