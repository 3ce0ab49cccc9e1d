"""The origin of each operator of a traced step: its module, and its phase.

In the forward pass, hooks tell which module runs; code outside any module (the loss, the update)
says so with `at`. In the backward pass, autograd tells: its nodes are numbered in the order in
which the forward pass makes them, so the number of the node that runs says during which module it
was made. Nothing is guessed from shapes or names. A weight that two modules share has two
gradients, one for each module.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from tools.export.graphs.program import Node, Place, Program
from wire.costs import Phase

aten: Any = torch.ops.aten
LOSS = "loss"
OPTIMIZER = "optimizer"

_PLACE = "stillhouse_place"  # key in a node's meta
_recorder: ContextVar["_Recorder | None"] = ContextVar("_recorder", default=None)


@contextmanager
def recorded(module: nn.Module) -> Iterator[None]:
    """Within the block, record the place of every operator; the submodules are the layers."""
    recorder = _Recorder()
    hooks = []
    for path, part in module.named_modules():
        hooks.append(part.register_forward_pre_hook(partial(recorder.enter, path)))
        hooks.append(part.register_forward_hook(recorder.leave, always_call=True))
    token = _recorder.set(recorder)
    try:
        with recorder:
            yield
    finally:
        _recorder.reset(token)
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._running = [Place()]
        self._numbers: list[int] = []  # from autograd's node numbers[i] on, layers[i] runs
        self._layers: list[str] = []
        self._last: fx.Node | None = None
        self._changed()

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and give the nodes that its trace adds the present place."""
        result = func(*args, **(kwargs or {}))
        tracing = get_proxy_mode()
        if tracing is not None:
            newest = list(_newer(tracing.tracer.graph, self._last))
            for node in newest:
                node.meta[_PLACE] = self._place()
            self._last = newest[0] if newest else self._last
        return result

    def stand(self, place: Place) -> None:
        """From here on, code outside any module has this place."""
        self._running[0] = place
        self._changed()

    def enter(self, path: str, _: nn.Module, __: Any) -> None:
        self._running.append(Place(path))
        self._changed()

    def leave(self, _: nn.Module, __: Any, ___: Any) -> None:
        self._running.pop()
        self._changed()

    def _place(self) -> Place:
        at_work = torch._C._current_autograd_node()  # noqa: SLF001 -- there is no public way
        if at_work is None:
            return self._running[-1]
        index = bisect_right(self._numbers, at_work._sequence_nr()) - 1  # noqa: SLF001
        return Place(self._layers[max(index, 0)], "backward")

    def _changed(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())  # noqa: SLF001
        self._layers.append(self._running[-1].layer)


def _newer(graph: fx.Graph, last: fx.Node | None) -> Iterator[fx.Node]:
    """The nodes after `last`, the newest first."""
    for node in reversed(graph.nodes):
        if node is last:
            return
        yield node


def at(layer: str, phase: Phase = "forward") -> None:
    """From here on, code outside any module works for `layer`; no effect unless traced."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.stand(Place(layer, phase))


def place_of(node: fx.Node) -> Place:
    """The place of a traced operator."""
    place: Place = node.meta.get(_PLACE, Place())
    return place


def place_of_products(node: fx.Node) -> Place:
    """The place of the products that the rule for this operator makes.

    Batch norm has none of its own. Where it uses the second moments of a convolution's input (see
    rules/layers/pointwise.py), its products replace that convolution.
    """
    place = place_of(node)
    inputs = {aten.native_batch_norm.default: 0, aten.native_batch_norm_backward.default: 1}
    if node.target in inputs:
        source = node.args[inputs[node.target]]
        if isinstance(source, fx.Node) and source.target is aten.convolution.default:
            return replace(place, layer=place_of(source).layer)
    return place


def describe(place: Place) -> str:
    """A place in words: a module's path, or the gradient of one."""
    if place.layer in {LOSS, OPTIMIZER}:
        return "the training step"
    where = f"module {place.layer!r}" if place.layer else "the model's own forward"
    return f"the gradient of {where}" if place.phase == "backward" else where


def settled(program: Program) -> Program:
    """The training step with only those nodes as forward that the loss or a gradient needs.

    Other nodes of the forward rules (running statistics, untouched state) are the state's update.
    """
    needed: set[str] = set()
    nodes: list[Node] = []
    for node in reversed(program.nodes):
        place = node.place
        if place.phase == "backward" or place == Place(LOSS) or needed.intersection(node.outputs):
            needed.update(node.inputs)
        else:
            place = replace(place, phase="update")
        nodes.append(replace(node, place=place))
    return replace(program, nodes=tuple(reversed(nodes)))
