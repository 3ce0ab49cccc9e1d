"""The state is one vector, and the optimizer moves every value of it once, piece by piece."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from ondevice.trainer import TrainStep
from tests.export.programs import compiler
from tools.export import Adam, Sgd, export
from tools.export.tracing.state import PIECE, Tensors, pieces

WIDE = 600


def wide():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(),
        nn.Linear(WIDE, 5),
    )  # fmt: skip


def compiled(module, out, **changes):
    settings = {"optimizer": Sgd()} | changes
    return export(
        module, name="net", classes=5, input_shape=(3, 2, 2), batch=4, task="classify", out=out,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    "shapes",
    [
        [(WIDE, 12), (WIDE,), (WIDE, WIDE), (WIDE,), (5, WIDE), (5,)],
        [(PIECE,), (1,)],
        [(PIECE + 1,)],
        [(), (3, PIECE // 2), (7, 2), ()],
        [(2, PIECE + 5), (3,)],  # a row is never split
        [(1, PIECE + 5)],
        [(64, 64, 7, 7), (64,)] * 3,
        [(PIECE // 4,)] * 9,
    ],
    ids=str,
)
def test_pieces_cover_each_value_once_in_the_order_of_the_vector(shapes):
    counted, trained = 0, {}
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        values = torch.arange(counted, counted + size, dtype=torch.float64).reshape(shape)
        trained[f"p{number}"] = values.requires_grad_()
        counted += size
    cut = pieces(Tensors({**trained, "frozen": torch.zeros(9)}, {}, {}))
    walked = torch.cat([piece.gradient(trained) for piece in cut])
    assert torch.equal(walked, torch.arange(counted, dtype=torch.float64))
    ends = np.cumsum([piece.size for piece in cut])
    assert [piece.start for piece in cut] == [0, *ends[:-1]]
    rows = max(int(np.prod(shape[1:])) for shape in shapes)
    assert max(piece.size for piece in cut) <= max(PIECE, rows)
    assert len({piece.key for piece in cut}) == len(cut)


@pytest.mark.parametrize("optimizer", [Sgd(), Adam()], ids=["sgd", "adam"])
def test_large_layer_trains_as_in_pytorch(tmp_path, optimizer):
    manifest = compiled(wide(), tmp_path / "art", optimizer=optimizer).manifest
    assert WIDE * WIDE > PIECE
    moved = [s.size for s in manifest.graphs["train"].outputs if s.role != "metric"]
    assert sum(moved) == manifest.values  # every value is moved
    assert max(moved) <= PIECE


@pytest.mark.parametrize("parts", [1, 2])
def test_gradient_of_a_large_layer_is_never_there_in_one_piece(parts):
    program = compiler(wide(), (3, 2, 2), batch=4, classes=5, parts=parts).train()
    sizes = [program.specs[name].size for node in program.nodes for name in node.outputs if name]
    assert max(sizes) <= PIECE


def test_frozen_parameters_stay_and_all_others_move(tmp_path):
    module = wide()
    module[3].requires_grad_(requires_grad=False)
    artifact = compiled(module, tmp_path / "art", optimizer=Adam())
    start = load_file(artifact.weights)
    step = TrainStep(artifact, start, threads=1)
    random = np.random.default_rng(0)
    step.inputs["lr"][...] = 0.1
    for _ in range(3):
        step.inputs["x"][...] = random.standard_normal((4, 3, 2, 2))
        step.inputs["y"][...] = random.integers(0, 5, 4)
        step()
    for spec in artifact.manifest.state_of("parameter"):
        same = np.array_equal(step.state[spec.name], start[spec.name])
        assert same == (spec.name in {"3.weight", "3.bias"}), spec.name
    assert not any(spec.name.endswith(".3.weight") for spec in artifact.manifest.state)
    assert step.state["optim.step"] == 3


def test_step_leaves_the_state_it_was_given_alone(tmp_path):
    artifact = compiled(wide(), tmp_path / "art")
    given = load_file(artifact.weights)
    before = {name: array.copy() for name, array in given.items()}
    step = TrainStep(artifact, given, threads=1)
    step.inputs["lr"][...] = 0.1
    step()
    step()
    assert all(np.array_equal(given[name], array) for name, array in before.items())
    assert not np.array_equal(step.state["5.bias"], before["5.bias"])
