"""The costs of a program, counted from its nodes; wire/costs.py explains the columns.

Bytes are those of the tensors that a node reads and writes, each once, constants included. A view
moves nothing, unless it is an output of the graph: ONNX Runtime writes outputs to separate memory.
A slice reads as much as it writes.
"""

import math
from collections import Counter
from collections.abc import Sequence

from tools.export.graphs.program import PRODUCTS, Node, Program
from wire.costs import PHASES, LayerCost, NodeCosts, Phase, layer_costs, total

VIEWS = frozenset(["Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"])


def costs(program: Program) -> tuple[tuple[LayerCost, ...], NodeCosts]:
    """The table of layers, in the order of their first nodes, and the table of nodes."""
    rows: dict[tuple[str, Phase], int] = {}
    activations = _activation_bytes(program)
    nodes = NodeCosts(
        row=tuple(
            rows.setdefault((node.place.layer, node.place.phase), len(rows))
            for node in program.nodes
        ),
        flops=tuple(node_flops(program, node) for node in program.nodes),
        bytes=tuple(node_bytes(program, node) for node in program.nodes),
        activation_bytes=tuple(activations[number] for number in range(len(program.nodes))),
    )
    return layer_costs(tuple(rows), nodes), nodes


def flops(program: Program) -> int:
    """2 x multiply-accumulates of the convolutions and matrix products, in one run."""
    return sum(node_flops(program, node) for node in program.nodes)


def node_flops(program: Program, node: Node) -> int:
    """2 x multiply-accumulates of one node; 0 if it is neither convolution nor product."""
    if node.op not in PRODUCTS:
        return 0
    left, right = (program.specs[name].shape for name in node.inputs[:2])
    out = program.specs[node.outputs[0]].shape
    if node.op == "Conv":  # weight (outputs, inputs / groups, *kernel)
        return 2 * math.prod(out) * math.prod(right[1:])
    if node.op == "ConvTranspose":  # weight (inputs, outputs / groups, *kernel)
        return 2 * math.prod(left) * math.prod(right[1:])
    if node.op == "Gemm":
        return 2 * math.prod(out) * left[0 if node.attribute("transA", 0) else 1]
    return 2 * math.prod(out) * left[-2 if node.attribute("transA", 0) else -1]


def node_bytes(program: Program, node: Node) -> int:
    """Bytes that one node reads and writes."""
    if _is_view(program, node):
        return 0
    written = sum(program.specs[name].bytes for name in node.outputs if name)
    read = [program.specs[name].bytes for name in dict.fromkeys(node.inputs) if name]
    if node.op == "Slice":
        read[0] = written
    return written + sum(read)


def table(layers: Sequence[LayerCost], batch: int) -> str:
    """The costs of a sample as text: for each layer, MFLOPs and kB moved by phase, and kB kept."""
    rows: dict[str, list[LayerCost]] = {}
    for layer in layers:
        rows.setdefault(layer.name, []).append(layer)
    wide = max(len("(model)"), *map(len, rows))
    lines = [
        f"{'':{wide}}" + "".join(f"{phase:>20}" for phase in PHASES),
        f"{'by sample':{wide}}" + f"{'MFLOPs':>10}{'kB':>10}" * len(PHASES) + f"{'kB kept':>10}",
    ]
    for name, row in [*rows.items(), ("total", layers)]:
        sums = [total(row, phase) for phase in PHASES]
        numbers = [number for cost in sums for number in (cost.flops / 1e6, cost.bytes / 1e3)]
        numbers.append(sum(cost.activation_bytes for cost in sums) / 1e3)
        cells = (f"{number / batch:10.3f}" if number else f"{'-':>10}" for number in numbers)
        lines.append(f"{name or '(model)':{wide}}" + "".join(cells))
    return "\n".join(lines)


def _is_view(program: Program, node: Node) -> bool:
    return node.op in VIEWS and node.outputs[0] not in program.outputs


def _activation_bytes(program: Program) -> Counter[int]:
    """Bytes of the outputs of each forward node, by its index, that the backward pass reads."""
    source: dict[str, str] = {}  # of a view: the tensor whose memory it shares
    maker: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for number, node in enumerate(program.nodes):
        if _is_view(program, node):
            source[node.outputs[0]] = source.get(node.inputs[0], node.inputs[0])
            continue
        if node.place.phase == "forward":
            maker |= dict.fromkeys(filter(None, node.outputs), number)
        elif node.place.phase == "backward":
            read = {source.get(name, name) for name in node.inputs}
            sizes |= {name: program.specs[name].bytes for name in read & maker.keys()}
    by_node: Counter[int] = Counter()
    for name, size in sizes.items():
        by_node[maker[name]] += size
    return by_node
