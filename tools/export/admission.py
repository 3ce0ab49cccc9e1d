"""The checks that a module passes before its training step is compiled, or is refused."""

import copy
import functools
import itertools
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm  # the one class that all batch norms share

from models.submodel import FORWARD_FAULTS, first_line
from tools.export.tracing.state import Tensors
from wire.errors import ExportError

RESERVED = frozenset(
    [
        "x",
        "y",
        "lr",
        "teacher",
        "alpha",
        "temperature",
        "first",
        "last",
        "mu",
        "loss",
        "correct",
        "logits",
        "features",
    ]
)
_HOOKS = "hooks on saved tensors cannot be compiled; call the module without checkpointing"
_FLOATS = (torch.float64, torch.float16, torch.bfloat16)
_BUFFERS = (torch.float32, torch.int64, torch.int32, torch.bool)
# Ranges of the state vector (tracing/state.py); constants and values of a graph (graphs/graph.py).
_MADE = re.compile(r"(state|next)\[\d+:\d+\]|[cv]\d+")


def admit(
    module: nn.Module, *, name: str, classes: int, shape: tuple[int, ...], batch: int
) -> Tensors:
    """The module's tensors by role.

    Raises:
        ExportError: the module cannot be trained as it is; the message says what to change.
    """
    if batch < 1 or classes < 2 or not shape or min(shape) < 1:
        raise ExportError(
            f"{name}: expected a batch of 1 or more, 2 classes or more and a shape like (3, 32, "
            f"32); got batch {batch}, {classes} classes, shape {shape}"
        )
    tensors = _by_role(module, name)
    _check_norms(module, name, batch)
    _check_learning(module, name, classes, (batch, *shape), tensors)
    _check_flow(module, name, (batch, *shape))
    return tensors


def _by_role(module: nn.Module, name: str) -> Tensors:
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    for key, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            remedy = "call .float() on the module" if parameter.dtype in _FLOATS else "use a buffer"
            raise ExportError(
                f"{name}: parameter {key!r} is {parameter.dtype}, expected torch.float32; {remedy}"
            )
        if parameter.numel() == 0:
            raise ExportError(
                f"{name}: parameter {key!r} has no values (shape {tuple(parameter.shape)}), "
                f"expected 1 or more; remove it"
            )
    saved = module.state_dict().keys()
    buffers: dict[str, Tensor] = {}
    fixed: dict[str, Tensor] = {}
    for key, buffer in module.named_buffers():
        if buffer.dtype in _FLOATS:
            raise ExportError(
                f"{name}: buffer {key!r} is {buffer.dtype}, expected torch.float32; "
                f"call .float() on the module"
            )
        if buffer.dtype not in _BUFFERS:
            raise ExportError(
                f"{name}: buffer {key!r} is {buffer.dtype}, expected torch.float32, int64, int32 "
                f"or bool; cast it to int64 or float32"
            )
        in_state = buffer.dtype == torch.float32 and key in saved
        (buffers if in_state else fixed)[key] = buffer
    tensors = Tensors(parameters, buffers, fixed)
    if not tensors.trained:
        raise ExportError(f"{name}: no parameter requires a gradient; there is nothing to train")
    _check_names(name, [*parameters, *buffers, *fixed])
    return tensors


def _check_names(name: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key in RESERVED or key.startswith("optim.") or _MADE.fullmatch(key):
            raise ExportError(
                f"{name}: a tensor is called {key!r}, which the compiled step uses itself; "
                f"rename the attribute"
            )


def _check_norms(module: nn.Module, name: str, batch: int) -> None:
    for path, part in module.named_modules():
        if not isinstance(part, _BatchNorm):
            continue
        if batch == 1:
            raise ExportError(
                f"{name}: {path!r} is a batch norm; with a batch of 1 it normalizes by that one "
                f"sample's own statistics, and PyTorch refuses it where a channel has one value; "
                f"export with a batch of 2 or more, or use GroupNorm"
            )
        if part.momentum is None and part.track_running_stats:
            raise ExportError(
                f"{name}: {path!r} is a batch norm with a cumulative average (momentum=None), "
                f"whose step depends on a counter; give it a momentum, such as 0.1"
            )


class _Trail:
    """Says which part of a module runs, or was running when the forward pass failed."""

    def __init__(self, module: nn.Module) -> None:
        self._running: list[tuple[str, nn.Module]] = []
        for path, part in module.named_modules():
            part.register_forward_pre_hook(functools.partial(self._enter, path))
            part.register_forward_hook(self._leave)

    def _enter(self, path: str, part: nn.Module, _: Any) -> None:
        self._running.append((path, part))

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __str__(self) -> str:
        path, part = self._running[-1] if self._running else ("", None)
        return f"module {path!r} ({type(part).__name__})" if path else "the model's own forward"


def _check_learning(
    module: nn.Module, name: str, classes: int, shape: tuple[int, ...], tensors: Tensors
) -> None:
    """Check logits in both modes and that each trained parameter gets a gradient, on a copy."""
    module = copy.deepcopy(module)
    trail = _Trail(module)
    logits = _logits(module.train(), trail, name, classes, shape)
    if logits.requires_grad:
        labels = torch.arange(shape[0]) % classes
        F.cross_entropy(logits, labels).backward()  # type: ignore[no-untyped-call]
    parameters = dict(module.named_parameters())
    idle = [key for key in tensors.trained if parameters[key].grad is None]
    if idle:
        raise ExportError(
            f"{name}: parameter {idle[0]!r} gets no gradient ({len(idle)} such); remove it, or set "
            f"requires_grad=False to send it along unchanged"
        )
    _logits(module.eval(), trail, name, classes, shape)


def _logits(
    module: nn.Module, trail: _Trail, name: str, classes: int, shape: tuple[int, ...]
) -> Tensor:
    """The logits of random images, in the mode that the module is in."""
    mode = "" if module.training else " in evaluation mode"
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS):
            logits = module(images)
    except FORWARD_FAULTS as fault:
        raise ExportError(
            f"{name}: its forward pass{mode} fails on a batch of shape {shape}, in {trail}: {fault}"
        ) from fault
    expected = (shape[0], classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        remedy = "state the number of classes that the network has"
        raise ExportError(
            f"{name}: expected logits of shape {expected}{mode}, got {got}; "
            f"{'return what training returns' if mode else remedy}"
        )
    if logits.dtype != torch.float32:
        raise ExportError(
            f"{name}: expected logits of torch.float32{mode}, got {logits.dtype}; "
            f"call .float() on them"
        )
    return logits


def _check_flow(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Refuse a module that needs the values of its tensors, by forward passes without data."""
    module = copy.deepcopy(module)
    trail = _Trail(module)
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake: dict[str, Tensor] = {key: mode.from_tensor(tensor.detach()) for key, tensor in named}
        try:
            for training in (True, False):
                functional_call(module.train(training), fake, (torch.empty(shape),))
        except FORWARD_FAULTS as fault:
            raise ExportError(
                f"{name}: {trail} looks at its data ({first_line(fault)}); a compiled step has "
                f"fixed shapes and a fixed flow: no branch, loop, .item() or look-up by a mask "
                f"that depends on data. Use torch.where, or a product with the mask"
            ) from fault
