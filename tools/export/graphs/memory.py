"""The memory that a program's tensors take while it runs, node by node.

The model is ONNX Runtime as the agent sets it up (ondevice/trainer.py). Nodes run in their order.
An output is allocated when its node begins, and a tensor is freed when its last reader has ended. A
node that only changes the shape makes a view. Inputs and outputs of the graph are in the caller's
buffers and are not counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tools.export.graphs.cost import VIEWS
from tools.export.graphs.program import Program


@dataclass(frozen=True)
class Moment:
    """The tensors that are allocated while one node runs, with their bytes."""

    node: int
    alive: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors together."""
        return sum(self.alive.values())


def peak(program: Program) -> Moment:
    """The moment when most bytes are allocated."""
    return max(_moments(program), key=lambda moment: moment.bytes)


def last_readers(program: Program) -> dict[str, int]:
    """The index of the last node that reads a tensor or a view of it, for all but views."""
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


def arena_bytes(program: Program) -> int:
    """Bytes of ONNX Runtime's arena that the program's tensors take, with holes between them."""
    last = last_readers(program)
    outside = {*program.inputs, *program.constants, *program.outputs}
    arena = _Arena()
    for _ in range(2):  # the second run finds the arena as the first one left it
        alive: dict[str, tuple[int, int]] = {}
        for number, node in enumerate(program.nodes):
            if node.op not in VIEWS:
                for name in node.outputs:
                    if name and name not in outside:
                        alive[name] = arena.take(program.specs[name].bytes)
            for name in [n for n in alive if last.get(n, number) <= number]:
                arena.give(alive.pop(name))
    return arena.touched


class _Arena:
    """ONNX Runtime's BFCArena ("best fit with coalescing").

    Memory comes in regions. The first has 1 MB, and each is twice as large as the one before. A
    request is rounded up to 256 bytes and takes the smallest free chunk that holds it. The chunk is
    split if it is at least twice as large as the request. A chunk that is given back joins its free
    neighbours. Only pages that were ever used count.
    """

    def __init__(self) -> None:
        self._chunks: list[list[tuple[int, int, bool]]] = []  # by region: start, size, free
        self._used: list[int] = []
        self._next = 1 << 20

    @property
    def touched(self) -> int:
        """Bytes from each region's start to the last that was used."""
        return sum(self._used)

    def take(self, size: int) -> tuple[int, int]:
        """Region and start of a chunk of at least so many bytes."""
        size = max(256, -(-size // 256) * 256)
        fits = [
            ((chunk_size // 256).bit_length(), chunk_size, region, place)
            for region, chunks in enumerate(self._chunks)
            for place, (_, chunk_size, free) in enumerate(chunks)
            if free and chunk_size >= size
        ]
        if not fits:
            while self._next < size:
                self._next *= 2
            self._chunks.append([(0, self._next, True)])
            self._used.append(0)
            self._next *= 2
            return self.take(size)
        _, whole, region, place = min(fits)
        chunks = self._chunks[region]
        start = chunks[place][0]
        taken = size if whole >= 2 * size else whole
        chunks[place : place + 1] = [(start, taken, False)] + (
            [(start + taken, whole - taken, True)] if taken < whole else []
        )
        self._used[region] = max(self._used[region], start + size)
        return region, start

    def give(self, chunk: tuple[int, int]) -> None:
        """Give a chunk back."""
        region, start = chunk
        chunks = self._chunks[region]
        place = next(i for i, c in enumerate(chunks) if c[0] == start)
        first = place - 1 if place and chunks[place - 1][2] else place
        after = place + 1 < len(chunks) and chunks[place + 1][2]
        joined = chunks[first : place + (2 if after else 1)]
        chunks[first : first + len(joined)] = [(joined[0][0], sum(c[1] for c in joined), True)]
