"""Sub-models of a network: where it can be cut (`layout`), and the narrower network (`narrow`).

Federated Dropout (Caldas et al. 2018, arXiv 1812.07210) drops units of hidden linear layers and
filters of hidden convolutions, never the network's input or its logits. `models.channels` watches
a network run and says which channels belong together. A layout is returned only after a narrower
copy has computed what the whole network does with the dropped units' values set to zero. Layers
that mix channels stay whole: layer norm, group norm with one group, shuffled channels, attention
across heads. Other group norms and grouped convolutions lose whole groups.

    layout(model, input_shape)                  the groups of units of a network
    choose(layout, keep_rate, "random", ...)    the units that a device keeps
    cut(state, layout, units)                   their tensors; models.Average puts updates back
    narrow(model, layout, keep_rate)            a module with tensors of that size, to export
"""

import copy
import functools
import itertools
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # the one class of all batch and instance norms

from models import channels
from models.units import Layout, all_places, choose, cut, digest, kept_widths, paste
from wire.errors import StillhouseError

__all__ = ["Layout", "choose", "cut", "digest", "kept_widths", "layout", "narrow"]

# What the forward pass of a user's module may raise when it does not take a batch.
FORWARD_FAULTS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ArithmeticError,
    AssertionError,
)
TAKES = (
    "expected a module that takes one batch (N, channels, height, width) and returns logits "
    "(N, classes)"
)
_REMEDY = "take widths from tensors and layers, as torch.flatten(x, 1) and x.shape[1] do"


def layout(model: nn.Module, input_shape: tuple[int, int, int]) -> Layout:
    """The groups of a network's units, found by running copies of it on three random samples.

    Args:
        model: x (N, *input_shape) -> logits (N, classes).
        input_shape: of one sample (channels, height, width).

    Raises:
        StillhouseError: the network fails on such samples or returns no tensor, or a narrower copy
            fails or computes something else. The message names the module and what to change.
    """
    model = copy.deepcopy(model).cpu()
    name = type(model).__name__
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    # Three samples: x.view(-1, width) fails with half of the units, instead of mixing samples.
    x = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.random.fork_rng(devices=[]):
        watched = copy.deepcopy(model)
        for training in (True, False):
            run(
                watched.train(training), x,
                fails=f"{name} fails on samples of shape {input_shape}",
            )  # fmt: skip
        groups = _layout(channels.follow(watched, x))
    _prove(model.eval(), groups, x)
    return groups


def narrow(model: nn.Module, layout: Layout, keep_rate: float) -> nn.Module:
    """A copy of a network with fewer units; its weights are those of the first k of each group.

    Its tensors have the shapes of `cut`, and its layers' attributes (`in_channels`, `num_features`,
    `groups` and the like) say so too.

    Args:
        model: the whole network.
        layout: `layout(model, ...)`.
        keep_rate: in (0, 1].

    Raises:
        StillhouseError: the keep rate is not in (0, 1].
    """
    units = choose(layout, keep_rate, "ordered", seed=0, round_=0, device="")
    at = all_places(layout, units)
    narrower = copy.deepcopy(model)
    narrowed: dict[Tensor, Tensor] = {}  # layers that share a tensor go on sharing it
    for path, part in narrower.named_modules():
        for key, tensor in [
            *part.named_parameters(recurse=False, remove_duplicate=False),
            *part.named_buffers(recurse=False, remove_duplicate=False),
        ]:
            name = f"{path}.{key}" if path else key
            if at.get(name):
                if tensor not in narrowed:
                    narrowed[tensor] = _select(tensor, at[name])
                setattr(part, key, narrowed[tensor])
        _resize(part)
    return narrower


def _layout(seen: channels.Channels) -> Layout:
    """The groups of units: units are in one group if they own equally many indices of every axis.

    Whichever k units of a group stay, all shapes are the same.
    """
    owned: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, labels in enumerate(itertools.chain.from_iterable(seen.axes.values())):
        for unit, count in zip(*np.unique(labels, return_counts=True), strict=True):
            owned[int(unit)].append((place, int(count)))
    alike: dict[tuple[tuple[int, int], ...], tuple[str, dict[int, None]]] = {}
    for name, labels in seen.made:
        for unit in labels[labels > 0].tolist():
            alike.setdefault(tuple(owned[unit]), (name, {}))[1][unit] = None
    groups: dict[str, int] = {}
    numbers: dict[int, int] = {}
    for weight, units in alike.values():
        if len(units) > 1:  # one unit alone is always kept
            layer = weight.rpartition(".")[0] or weight
            names = itertools.chain([layer], (f"{layer}#{i}" for i in itertools.count(2)))
            groups[next(name for name in names if name not in groups)] = len(units)
            numbers |= {unit: len(numbers) + i for i, unit in enumerate(units)}
    axes = {
        name: tuple(
            np.array([numbers.get(unit, -1) for unit in labels.tolist()], np.int64)
            for labels in by_axis
        )
        for name, by_axis in seen.axes.items()
    }
    return Layout(
        groups,
        {
            name: tuple(axis if (axis >= 0).any() else None for axis in by_axis)
            for name, by_axis in axes.items()
        },
        {name: tuple(map(len, by_axis)) for name, by_axis in axes.items()},
    )


def _prove(model: nn.Module, layout: Layout, x: Tensor) -> None:
    """Compare a copy with half of the units to the whole network with zeros for the other half.

    A unit whose weights, bias and normalization are 0 has a constant output, and no layer reads it.
    """
    units = choose(layout, 0.5, "random", seed=0, round_=0, device="")
    state = {name: t.numpy() for name, t in model.state_dict().items() if name in layout.axes}
    part = cut(state, layout, units)
    blank = {name: np.zeros_like(array) for name, array in state.items()}
    narrower, name = narrow(model, layout, 0.5), type(model).__name__
    logits = []
    for network, tensors in ((model, paste(blank, part, layout, units)), (narrower, part)):
        network_state = network.state_dict()
        for key, array in tensors.items():
            network_state[key].copy_(torch.from_numpy(array))
        logits.append(run(network, x, fails=f"{name} fails when it is narrower", remedy=_REMEDY))
    masked, dense = logits
    error = (masked - dense).abs().max() if masked.shape == dense.shape else torch.tensor(torch.inf)
    if not error <= 1e-3 * masked.abs().max():
        raise StillhouseError(
            f"{name}: expected a narrower copy to compute what the network does without the units "
            f"left out, got logits that differ by {float(error):.3g}; {_REMEDY}"
        )


def run(model: nn.Module, x: Tensor, *, fails: str, remedy: str = TAKES) -> Tensor:
    """The model's logits.

    Raises:
        StillhouseError: the forward pass fails or returns no tensor. The message begins with
            `fails`, names the module that was running and ends with `remedy`.
    """
    running: list[str] = []

    def enter(path: str, part: nn.Module, _: object) -> None:
        running.append(f"module {path!r} ({type(part).__name__})" if path else "its own forward")

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for path, part in model.named_modules():
        handles.append(part.register_forward_pre_hook(functools.partial(enter, path)))
        handles.append(part.register_forward_hook(leave))
    try:
        with torch.no_grad():
            logits = model(x)
    except FORWARD_FAULTS as fault:
        where, reason = running[-1], first_line(fault)
        raise StillhouseError(f"{fails}, in {where}: {reason}; {remedy}") from fault
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor):
        raise StillhouseError(f"{fails}: it returns a {type(logits).__name__}; {remedy}")
    return logits


def first_line(fault: Exception) -> str:
    """The first line of an exception's text, or its type if it has none."""
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def _select(tensor: Tensor, at: tuple[np.ndarray, ...]) -> Tensor:
    value = tensor.detach()
    for axis, indices in enumerate(at):
        value = value.index_select(axis, torch.from_numpy(indices).to(value.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def _resize(part: nn.Module) -> None:
    """Make a layer's attributes those of its tensors."""
    match part:
        case nn.Linear():
            part.out_features, part.in_features = part.weight.shape
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            makes, reads = part.weight.shape[:2]
            if part.groups > 1:
                part.groups = part.groups * makes // part.out_channels
            part.in_channels, part.out_channels = part.groups * reads, makes
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            reads, makes = part.weight.shape[:2]
            part.in_channels, part.out_channels = reads, part.groups * makes
        case nn.GroupNorm(weight=Tensor()):
            part.num_groups = part.num_groups * len(part.weight) // part.num_channels
            part.num_channels = len(part.weight)
        case _NormBase():
            tensors = [t for t in (part.weight, part.running_mean) if t is not None]
            part.num_features = len(tensors[0]) if tensors else part.num_features
        case nn.PReLU():
            part.num_parameters = len(part.weight)
        case _:
            pass
