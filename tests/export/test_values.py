"""An operator on a graph's values makes one node, and means the same as on tensors."""

import numpy as np
import pytest
import torch

from tests.export.programs import run
from tools.export.graphs.graph import Graph
from tools.export.graphs.value import matmul

A = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
B = np.array([[2.0, 0.5, 3.0], [1.0, 5.0, 9.0]], np.float32)
MASK = np.array([[True, False, True], [False, True, True]])


@pytest.mark.parametrize(
    ("formula", "op"),
    [
        (lambda a, b: a + b, "Add"),
        (lambda a, b: a - b, "Sub"),
        (lambda a, b: a * b, "Mul"),
        (lambda a, b: a / b, "Div"),
        (lambda a, b: a**b, "Pow"),
        (lambda a, b: a > b, "Greater"),
        (lambda a, b: a < b, "Less"),
        (lambda a, _: 3 + a, "Add"),
        (lambda a, _: 3 - a, "Sub"),
        (lambda a, _: 3 * a, "Mul"),
        (lambda a, _: a / 2, "Div"),
        (lambda a, _: a**2, "Pow"),
        (lambda a, _: -a, "Neg"),
        (lambda a, _: abs(a), "Abs"),
        (lambda a, b: a @ b.T, "FusedMatMul"),
        (lambda a, b: a.T @ b, "FusedMatMul"),
        (lambda a, _: a.sum([1]), "ReduceSum"),
        (lambda a, _: a.mean([0]), "ReduceMean"),
        (lambda a, _: a.reshape((3, 2)), "Reshape"),
    ],
)
def test_operator_is_one_node_with_numpys_numbers(formula, op):
    g = Graph()
    result = formula(*(g.input(name, A.shape) for name in "ab"))
    g.output("y", result)
    program = g.program("formula")
    axes = formula(A, B) if "Reduce" not in op else formula(torch.tensor(A), None).numpy()
    assert [node.op for node in program.nodes] == [op]
    np.testing.assert_allclose(run(program, feed(program))["y"], axes, rtol=1e-6)


def feed(program):
    """The graph's inputs by name."""
    return {name: {"a": A, "b": B, "mask": MASK}[name] for name in program.inputs}


def test_choice_takes_one_value_where_the_mask_is_true():
    g = Graph()
    mask = g.input("mask", MASK.shape, torch.bool)
    g.output("y", mask.where(g.input("a", A.shape), g.input("b", B.shape)))
    program = g.program("choice")
    np.testing.assert_array_equal(run(program, feed(program))["y"], np.where(MASK, A, B))


def test_sum_of_expanded_values_is_computed_before_it_is_expanded():
    g = Graph()
    row = g.input("a", (1, 3))
    wide = row.expand((100, 3)) + 1
    g.output("y", wide)
    program = g.program("expanded")
    assert wide.shape == (100, 3)
    assert [(node.op, program.specs[node.outputs[0]].shape) for node in program.nodes] == [
        ("Add", (1, 3)),
        ("Expand", (100, 3)),
    ]


def test_product_reads_a_transposed_matrix_as_it_was_stored():
    g = Graph()
    a, b = g.input("a", (2, 3)), g.input("b", (2, 3))
    g.output("plain", a @ b.transpose([1, 0]))
    g.output("twice", matmul(a.transpose([1, 0]).T, b.T))
    ops = [node.op for node in g.program("product").nodes]
    assert ops == ["FusedMatMul", "Identity"]  # the second output equals the first


def test_result_that_is_the_value_itself_adds_no_node():
    g = Graph()
    a = g.input("a", (2, 3))
    same = [a.reshape((2, 3)), a.expand((2, 3)), a.cast(torch.float32), a.transpose([0, 1])]
    assert same == [a] * 4


def test_number_and_tensor_make_the_same_sum_in_either_order():
    g = Graph()
    a = g.input("a", (2, 3))
    assert 2 + a == a + 2
    assert 2 * a == a * 2


def test_value_has_no_truth_while_the_graph_is_built():
    g = Graph()
    with pytest.raises(TypeError, match="not known while it is built"):
        max(g.input("a", ()), g.input("b", ()))
