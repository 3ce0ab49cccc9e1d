"""From a function of tensors to a flat list of ATen operators.

`make_fx` runs the function on tensors without data and notes every operator, those of the backward
pass included. `functionalize` turns writes in place (ReLU(inplace=True), counters) into new values.
PyTorch's own decompositions take the operators that have no rule of ours down to its core set.

What stays in place is batch norm's update of the running statistics, hidden in its kernel; `lower`
gives the changed buffers their new values.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from tools.export.rules import RULES

_PATH = "stillhouse_module"


def trace(
    function: Callable[..., list[Tensor]], inputs: Sequence[Tensor], module: nn.Module
) -> fx.GraphModule:
    """The operators that `function` runs on `inputs`; `module` is what it calls, for messages."""
    table = {op: how for op, how in core_aten_decompositions().items() if op not in RULES}
    marks: list[tuple[int, str]] = []
    hooks = []
    for path, part in module.named_modules():
        hooks.append(part.register_forward_pre_hook(functools.partial(_enter, marks, path)))
        hooks.append(part.register_forward_hook(functools.partial(_leave, marks, path)))
    try:
        graph = make_fx(
            functionalize(function, remove="mutations_and_views"),
            decomposition_table=table,
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*(tensor.detach().clone() for tensor in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    _note_paths(graph.graph, marks)
    graph.graph.eliminate_dead_code()
    return graph


def module_of(node: fx.Node) -> str:
    """Where an operator comes from, in words: a module's path, or that it is a gradient of one."""
    backward = False
    seen = {node}
    level = [node]
    while level:
        for candidate in level:
            path = candidate.meta.get(_PATH)
            if path is not None:
                where = f"module {path!r}" if path else "the model's own forward"
                return f"the gradient of {where}" if backward else where
        backward = True
        level = [i for n in level for i in n.all_input_nodes if i not in seen]
        seen.update(level)
    return "the training step"


def _count() -> int:
    mode = get_proxy_mode()
    return 0 if mode is None else len(mode.tracer.graph.nodes)


def _enter(marks: list[tuple[int, str]], path: str, _: nn.Module, __: Any) -> None:
    marks.append((_count(), path))


def _leave(marks: list[tuple[int, str]], path: str, _: nn.Module, __: Any, ___: Any) -> None:
    outer = None if not path else path.rpartition(".")[0]
    marks.append((_count(), "\0" if outer is None else outer))


def _note_paths(graph: fx.Graph, marks: list[tuple[int, str]]) -> None:
    """Each mark names the module that runs from the given number of nodes on."""
    path = "\0"
    waiting = iter([*marks, (len(graph.nodes) + 1, "\0")])
    at, following = next(waiting)
    for number, node in enumerate(graph.nodes):
        while at <= number:
            path = following
            at, following = next(waiting)
        if path != "\0" and node.op == "call_function":
            node.meta[_PATH] = path


