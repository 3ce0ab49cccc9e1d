"""How much memory a program's tensors take while it runs, node by node.

This is what ONNX Runtime does as the agent sets it up (edge_agent/trainer.py): nodes in their
order, an output allocated when its node begins, a tensor freed when its last reader has ended,
views where a node only changes the shape. Inputs and outputs of the graph lie in buffers of the
caller's and are not counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tools.export.cost import VIEWS
from tools.export.program import Program


@dataclass(frozen=True)
class Moment:
    """What is allocated while one node runs."""

    node: int
    alive: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(self.alive.values())


def peak(program: Program) -> Moment:
    """The moment of the greatest need."""
    return max(_moments(program), key=lambda moment: moment.bytes)


def last_readers(program: Program) -> dict[str, int]:
    """By tensor that is no view: the place of the last node that reads it or a view of it."""
    roots: dict[str, str] = {}
    last: dict[str, int] = {}
    for number, node in enumerate(program.nodes):
        if node.op in VIEWS and node.outputs[0] not in program.outputs:
            roots[node.outputs[0]] = roots.get(node.inputs[0], node.inputs[0])
        for name in node.inputs:
            last[roots.get(name, name)] = number
    return last


def _moments(program: Program) -> Iterator[Moment]:
    last = last_readers(program)
    outside = {*program.inputs, *program.constants, *program.outputs}
    alive: dict[str, int] = {}
    for number, node in enumerate(program.nodes):
        view = node.op in VIEWS
        fresh = [name for name in node.outputs if name and name not in outside and not view]
        alive |= {name: program.specs[name].bytes for name in fresh}
        yield Moment(number, dict(alive))
        for name in [n for n in alive if last.get(n, number) <= number]:
            del alive[name]
