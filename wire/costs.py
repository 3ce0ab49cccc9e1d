"""The cost of one run of a graph, counted when it is compiled: by layer and phase, and by node.

    flops               2 x multiply-adds of convolutions and matrix products; other work is not
                        counted
    bytes               read and written by the nodes; a view (a reshape, say) moves none
    activation_bytes    results of the forward pass that the backward pass reads, counted at the
                        node that makes them

A run is of the whole batch, or of one micro-batch if there are several.

Phases: `forward` is the model, the loss and its metric; `backward` the gradients; `update` the
optimizer, running statistics and sums over micro-batches. A layer is the path of one of the model's
modules, and stands for the work that the module does itself, not in its submodules. Further layers
are "" (the model as a whole), `loss` and `optimizer`.

Nodes stand in columns. Entry n of each column is the node named `n<n>` in the ONNX file, so that a
profile can be joined with the table. The table comes from the network: sums and sizes are checked.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Phase = Literal["forward", "backward", "update"]
PHASES: tuple[Phase, ...] = get_args(Phase)
MAX_NODES = 1 << 16
MAX_ROWS = 1 << 14
MAX_COST = 1 << 62

_SIZES = ("flops", "bytes", "activation_bytes", "nodes")
_LAYER = re.compile(r"[!-~]{0,256}")


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer in one phase; `nodes` counts its nodes."""

    name: str
    phase: Phase
    flops: int
    bytes: int
    activation_bytes: int
    nodes: int

    def __post_init__(self) -> None:
        if not _LAYER.fullmatch(self.name):
            raise ValueError(f"layer name: expected up to 256 printable, got {self.name!r:.80}")
        for key in _SIZES:
            _check_size(f"{key} of layer {self.name!r}", getattr(self, key))


@dataclass(frozen=True)
class NodeCosts:
    """The costs of all nodes, in columns; `row` is the row of a node's layer and phase."""

    row: tuple[int, ...]
    flops: tuple[int, ...]
    bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = [len(self.row), len(self.flops), len(self.bytes), len(self.activation_bytes)]
        if min(lengths) != max(lengths) or lengths[0] > MAX_NODES:
            raise ValueError(f"nodes: expected columns of one length to {MAX_NODES}, got {lengths}")
        for key in _SIZES[:-1]:
            for number, size in enumerate(getattr(self, key)):
                _check_size(f"{key} of node n{number}", size)


def layer_costs(places: Sequence[tuple[str, Phase]], nodes: NodeCosts) -> tuple[LayerCost, ...]:
    """The table of layers that the nodes add up to, for rows with these names and phases."""
    sums = [[0, 0, 0, 0] for _ in places]
    columns = (nodes.flops, nodes.bytes, nodes.activation_bytes)
    for row, *sizes in zip(nodes.row, *columns, strict=True):
        if not 0 <= row < len(places):
            raise ValueError(f"nodes: expected rows 0 to {len(places) - 1}, got {row}")
        sums[row] = [whole + size for whole, size in zip(sums[row], [*sizes, 1], strict=True)]
    return tuple(LayerCost(*place, *whole) for place, whole in zip(places, sums, strict=True))


def total(layers: Iterable[LayerCost], phase: Phase) -> LayerCost:
    """The sums of one phase over all layers, under the name ""."""
    chosen = [layer for layer in layers if layer.phase == phase]
    return LayerCost("", phase, *(sum(getattr(layer, key) for layer in chosen) for key in _SIZES))


def check(layers: tuple[LayerCost, ...], nodes: NodeCosts, *, flops: int) -> None:
    """Raise ValueError unless the nodes add up to the layers, and the layers to `flops`."""
    if len(layers) > MAX_ROWS:
        raise ValueError(f"layers: {len(layers)} rows, limit {MAX_ROWS}")
    places = [(layer.name, layer.phase) for layer in layers]
    if len(set(places)) != len(places):
        raise ValueError("layers: two rows have one name and phase")
    for layer, counted in zip(layers, layer_costs(places, nodes), strict=True):
        if layer != counted or not layer.nodes:
            raise ValueError(f"layers: its nodes add up to {counted}, got {layer}")
    whole = sum(layer.flops for layer in layers)
    if whole != flops:
        raise ValueError(f"flops: expected the sum of the layers' {whole}, got {flops}")


def _check_size(what: str, size: int) -> None:
    if not 0 <= size < MAX_COST:
        raise ValueError(f"{what}: expected 0 or more and less than {MAX_COST}, got {size}")
