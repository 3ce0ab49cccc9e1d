"""The predicted memory of a step's tensors, checked on small graphs with a known answer."""

import pytest
import torch

import models
from tests.export.programs import compiler
from tools.export.graphs import memory
from tools.export.graphs.graph import Graph
from tools.export.graphs.memory import _Arena
from tools.export.graphs.recompute import recompute

MB = 1 << 20


def by_hand():
    """The graph x -> a -> view of a -> large output; x -> b -> c -> the same output, and a mask."""
    g = Graph()
    x = g.input("x", (1000,))
    a = g.node("Exp", x, shape=(1000,))
    view = g.node("Reshape", a, g.ints([10, 100]), shape=(10, 100))
    b = g.node("Sin", x, shape=(1000,))
    mask = g.node("Greater", b, x, shape=(1000,), dtype=torch.bool)
    c = g.node("Where", mask, b, x, shape=(1000,))
    square = g.node("Reshape", c, g.ints([10, 100]), shape=(10, 100))
    both = g.node("Concat", view, square, shape=(10, 200), axis=1)
    g.output("wide", g.node("Expand", both, g.ints([7, 10, 200]), shape=(7, 10, 200)))
    g.output("c", g.node("Cos", x, shape=(1000,)))
    return g.program("by hand"), a, b, mask, c, both


def test_peak_counts_what_is_alive_through_views_but_no_output_of_the_graph():
    program, a, b, mask, c, both = by_hand()
    moment = memory.peak(program)
    # While the concatenation runs, a and c live on in their views; b and the mask are gone.
    assert program.nodes[moment.node].op == "Concat"
    assert moment.alive == {a.name: 4000, c.name: 4000, both.name: 8000}
    assert moment.bytes == 16_000 < program.specs["wide"].bytes == 56_000
    last = memory.last_readers(program)
    assert program.nodes[last[a.name]].op == program.nodes[last[c.name]].op == "Concat"
    assert program.nodes[last[b.name]].op == program.nodes[last[mask.name]].op == "Where"


def test_output_that_is_a_view_is_a_copy_that_frees_its_source():
    g = Graph()
    a = g.node("Exp", g.input("x", (1000,)), shape=(1000,))
    g.output("flat", g.node("Reshape", a, g.ints([10, 100]), shape=(10, 100)))
    b = g.node("Sin", g.input("z", (3000,)), shape=(3000,))
    g.output("sum", g.node("ReduceSum", b, shape=(1,)))
    moment = memory.peak(g.program("copies"))
    assert moment.alive == {b.name: 12_000}


def test_arena_grows_by_regions_of_one_two_and_four_megabytes():
    arena = _Arena()
    assert arena.take(700_000) == (0, 0)
    assert arena.take(700_000) == (1, 0)  # the first region has only 0.3 MB left
    assert arena.take(3 * MB) == (2, 0)
    assert arena.touched == 2 * 700_160 + 3 * MB  # requests come in units of 256 bytes
    assert _Arena().take(1) == (0, 0)


def test_arena_makes_a_region_as_large_as_the_request():
    arena = _Arena()
    assert arena.take(5 * MB) == (0, 0)  # a region of 8 MB, which is one chunk
    assert arena.take(9 * MB) == (1, 0)  # a region of 16 MB
    assert arena.touched == 14 * MB


def test_request_takes_a_chunk_whole_unless_it_is_twice_as_large():
    whole = _Arena()
    whole.take(MB // 2 + 256)
    assert whole.take(256) == (1, 0)
    split = _Arena()
    split.take(MB // 2)
    assert split.take(256) == (0, MB // 2)
    assert split.touched == MB // 2 + 256


@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_chunks_that_are_given_back_join_their_neighbours(order):
    arena = _Arena()
    chunks = {name: arena.take(MB // 4) for name in "abc"}
    for name in order:
        arena.give(chunks[name])
    assert arena.take(MB) == (0, 0)
    assert arena.touched == MB


def test_request_goes_to_the_smallest_chunk_that_holds_it():
    arena = _Arena()
    chunks = [arena.take(size) for size in (MB // 4, 256, MB // 8, 256)]
    arena.give(chunks[0])
    arena.give(chunks[2])
    assert arena.take(MB // 8) == chunks[2]
    assert arena.take(MB // 8) == chunks[0]


def test_arena_of_a_program_is_what_the_same_requests_take():
    program, *_ = by_hand()
    # a, b, mask (1000 bytes) and c in a row; then b and the mask are free; 8000 bytes follow c.
    assert memory.arena_bytes(program) == 4096 + 4096 + 1024 + 4096 + 8192


def test_arena_holds_the_peak_and_is_the_same_every_time():
    module = models.build("resnet8", classes=10)
    program = compiler(module, (3, 32, 32), batch=4, classes=10).train()
    for each in (program, *recompute(program)):
        assert memory.arena_bytes(each) >= memory.peak(each).bytes
        assert memory.arena_bytes(each) == memory.arena_bytes(each)
    again = compiler(module, (3, 32, 32), batch=4, classes=10).train()
    assert memory.arena_bytes(again) == memory.arena_bytes(program)
