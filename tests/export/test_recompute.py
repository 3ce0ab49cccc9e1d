"""Recomputing activations changes no bit of a result, and lowers the peak of memory."""

import numpy as np
import pytest
from torch import nn

import models
from tests.export.programs import compiler, random_inputs, run
from tools.export.graphs import memory
from tools.export.graphs.recompute import recompute

CLASSES = 10


def sequential():
    """A chain of layers: to recompute an activation, those before it are recomputed too."""
    layers = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(4):
        layers += [nn.GELU(), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 64, CLASSES))


NETS = {
    "resnet8": (models.build("resnet8", classes=CLASSES), (3, 32, 32), 4),
    "resnet19": (models.build("resnet19", classes=CLASSES), (16, 8, 8), 8),
    "sequential": (sequential(), (3, 16, 16), 8),
}


@pytest.fixture(scope="module", params=NETS)
def programs(request):
    """A training step, and the steps after recomputing one more activation each."""
    module, shape, batch = NETS[request.param]
    plain = compiler(module, shape, batch=batch, classes=CLASSES).train()
    return [plain, *recompute(plain)]


def test_every_program_gives_the_same_outputs_to_the_bit(programs):
    plain, *trials = programs
    feed = random_inputs(plain, classes=CLASSES)
    expected = run(plain, feed)
    assert all(np.isfinite(array).all() for array in expected.values())
    assert trials
    for trial in trials:
        got = run(trial, feed)
        assert list(got) == list(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_inputs_and_outputs_keep_their_names_and_every_value_has_its_own(programs):
    plain = programs[0]
    for program in programs:
        assert (program.inputs, program.outputs) == (plain.inputs, plain.outputs)
        made = [name for node in program.nodes for name in node.outputs if name]
        assert len(made) == len(set(made))


def test_no_node_runs_before_what_it_reads(programs):
    for program in programs:
        known = {"", *program.inputs, *program.constants}
        for node in program.nodes:
            assert known.issuperset(node.inputs)
            known.update(node.outputs)


def test_peak_never_rises_and_ends_lower_for_more_nodes(programs):
    peaks = [memory.peak(program).bytes for program in programs]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]
    sizes = [len(program.nodes) for program in programs]
    assert sizes == sorted(set(sizes))


def test_only_the_forward_pass_runs_again(programs):
    plain, last = programs[0], programs[-1]
    before = {name for node in plain.nodes for name in node.outputs}
    again = [node for node in last.nodes if not before.issuperset(node.outputs)]
    assert {node.place.phase for node in again} == {"forward"}
    assert len(again) >= len(last.nodes) - len(plain.nodes) > 0
