"""Trade time for memory: compute activations a second time instead of keeping them.

Most of a training step's memory holds activations, from the forward pass that makes them to the
backward pass that reads them. An activation can be dropped and made again just before the backward
pass needs it, from tensors that are kept anyway (gradient checkpointing, Chen et al. 2016, arXiv
1604.06174). Results stay the same to the bit; only the order and the number of nodes change.

Chen et al. cut the network into blocks and keep the tensors between them. Here a greedy search
serves any network: at the moment of the greatest need, it drops the activation that frees most
bytes for the least additional work, and repeats. Batch norms and ReLUs come first (a pass over
memory each), blocks of convolutions follow.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tools.export.graphs import cost, memory
from tools.export.graphs.program import Node, Program

SMALL = 1 << 16  # bytes; a smaller tensor is not worth a second computation, and is kept
_AGAIN = "~"  # appended to the name of a tensor that is computed again
_BYTE_FLOPS = 10  # moving a byte takes about the time of so many operations in a product


@dataclass(frozen=True)
class _Plan:
    """One activation to drop: `nodes` compute it again, just before node `at`."""

    name: str
    at: int
    nodes: tuple[int, ...]
    work: float


def recompute(program: Program) -> Iterator[Program]:
    """Programs that each compute one more activation again, until that lowers the peak no more."""
    best, need = program, memory.peak(program)
    refused: set[str] = set()
    while True:
        candidates = [p for p in _plans(best, need) if p.name not in refused]
        if not candidates:
            return
        sizes = need.alive
        chosen = max(candidates, key=lambda plan: (sizes[plan.name] / plan.work, plan.name))
        trial = _apply(best, chosen)
        after = memory.peak(trial)
        # At several moments of the same need the first drop alone gains nothing yet.
        if after.bytes > need.bytes or (after.bytes == need.bytes and after.node == need.node):
            refused.add(chosen.name)
            continue
        best, need = trial, after
        yield best


def _plans(program: Program, need: memory.Moment) -> list[_Plan]:
    """The activations that could be computed again after the moment of need."""
    last = memory.last_readers(program)
    makers = {name: i for i, node in enumerate(program.nodes) for name in node.outputs}
    readers = program.readers()
    plans = []
    for name, size in need.alive.items():
        node = program.nodes[makers[name]]
        if size <= SMALL or node.place.phase != "forward" or name.endswith(_AGAIN):
            continue
        later = [i for i in _all_readers(program, readers, name) if i > need.node]
        if not later or min(later) <= makers[name]:
            continue
        at = min(later)
        nodes = _again(program, makers, last, name, at)
        if nodes is not None:
            work = sum(
                cost.node_flops(program, program.nodes[i])
                + _BYTE_FLOPS * cost.node_bytes(program, program.nodes[i])
                for i in nodes
            )
            plans.append(_Plan(name, at, nodes, work))
    return plans


def _all_readers(program: Program, readers: Mapping[str, list[int]], name: str) -> list[int]:
    """The nodes that read a tensor or a view of it, the views themselves left out."""
    numbers = []
    for number in readers.get(name, []):
        node = program.nodes[number]
        if node.op in cost.VIEWS and node.outputs[0] not in program.outputs:
            numbers += _all_readers(program, readers, node.outputs[0])
        else:
            numbers.append(number)
    return numbers


def _again(
    program: Program, makers: Mapping[str, int], last: Mapping[str, int], name: str, at: int
) -> tuple[int, ...] | None:
    """The nodes that make `name` from what is alive at node `at`; None if one cannot run twice."""
    nodes: set[int] = set()
    waiting = [name]
    while waiting:
        wanted = waiting.pop()
        number = makers.get(wanted)
        if number is None or number in nodes:
            continue
        node = program.nodes[number]
        if program.outputs and set(node.outputs) & set(program.outputs):
            return None
        nodes.add(number)
        for source in filter(None, node.inputs):
            fed = source in program.inputs or source in program.constants
            alive = last.get(_root(program, makers, source), -1) >= at and source != name
            if not fed and not alive and not _is_small(program, source):
                waiting.append(source)
    return tuple(sorted(nodes))


def _is_small(program: Program, name: str) -> bool:
    return program.specs[name].bytes <= SMALL


def _root(program: Program, makers: Mapping[str, int], name: str) -> str:
    while name in makers and program.nodes[makers[name]].op in cost.VIEWS:
        name = program.nodes[makers[name]].inputs[0]
    return name


def _apply(program: Program, plan: _Plan) -> Program:
    """The program with the plan's nodes again before node `at`; later nodes read their results."""
    fresh = {
        output: _unused(program, output)
        for i in plan.nodes
        for output in program.nodes[i].outputs
        if output
    }
    again = [_renamed(program.nodes[i], fresh, both=True) for i in plan.nodes]
    # A view of the dropped tensor that was made in the forward pass would keep it alive.
    views = {plan.name}
    moved: list[Node] = []
    for number, node in enumerate(program.nodes[: plan.at]):
        if node.op in cost.VIEWS and node.inputs[0] in views and number not in plan.nodes:
            views.add(node.outputs[0])
            fresh[node.outputs[0]] = _unused(program, node.outputs[0])
            moved.append(_renamed(node, fresh, both=True))
    head = program.nodes[: plan.at]
    tail = [_renamed(node, fresh, both=False) for node in program.nodes[plan.at :]]
    specs = {**program.specs, **{new: program.specs[old] for old, new in fresh.items()}}
    return program.with_nodes([*head, *again, *moved, *tail], specs)


def _unused(program: Program, name: str) -> str:
    """A new name for a tensor that is computed again, perhaps for the second time."""
    while name in program.specs:
        name += _AGAIN
    return name


def _renamed(node: Node, fresh: Mapping[str, str], *, both: bool) -> Node:
    inputs = tuple(fresh.get(name, name) for name in node.inputs)
    outputs = tuple(fresh.get(name, name) for name in node.outputs) if both else node.outputs
    return replace(node, inputs=inputs, outputs=outputs)
