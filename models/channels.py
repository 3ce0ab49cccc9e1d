"""The channels of a network that must be kept or dropped together, found by watching it run.

The network runs on a few random samples. Every ATen operator passes labels (`models.ties`) from its
inputs to its output, axis by axis, and ties the labels that it brings together: a convolution ties
its input's channels to its filters' second axis, an addition ties the channels of both sides, a
batch norm ties its statistics to its input. Flattening (C, H, W) repeats each channel's label H * W
times, a concatenation joins labels, padding adds zeros. Some channels must stay: those that an
operator mixes without weights (layer norm, softmax or mean over channels), those that an operator
without a rule touches, and the network's input and logits.

Running a network allows any Python in its `forward`: branches on shapes, loops, functional calls,
raw parameters, shared layers. A symbolic trace would not, and ATen's operators are few.

The exporter has a table of ATen operators, too (`tools.export.rules`). The two share names, but no
facts. The exporter's says how each overload is written in ONNX, after PyTorch has decomposed the
model and its backward pass; an operator without a rule is an error there. This one says how labels
move through a module that runs as it is, with writes in place and random numbers. Most operators
are elementwise, which PyTorch's own tags tell; one without a rule only keeps its channels whole.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # public in all but its path

from models.ties import Axes, Labels, Ties, stay

_BATCH_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")

Call = dict[str, Any]  # an operator's arguments by name
Rule = Callable[[Ties, Call, Tensor], Axes]  # (ties, arguments, output) -> labels of the output


@dataclass(frozen=True)
class Channels:
    """The units of a network's tensors. Their numbers mean nothing, but unit 0 must stay.

    Attributes:
        axes: state_dict name -> for each axis the unit of each index.
        made: (name of the weight, unit of each index) of the axes along which layers made their
            outputs, in the order in which they ran.
    """

    axes: dict[str, Axes]
    made: list[tuple[str, Labels]]


def follow(model: nn.Module, x: Tensor) -> Channels:
    """Watch `model(x)`, in training mode and in evaluation mode, which may differ.

    Args:
        model: returns logits (N, classes); pass a copy, for its batch-norm statistics change.
        x: a batch, (N, *input shape).
    """
    state = model.state_dict(keep_vars=True)
    ties = Ties({name: t for name, t in state.items() if t.is_floating_point()})
    watch = _Watch(ties, model)
    for training in (True, False):
        model.train(training)
        with torch.no_grad(), watch:
            logits = model(x)
        ties.whole(*ties.axes(logits))
    units = ties.units()
    axes = {name: tuple(units[labels] for labels in ties.axes(t)) for name, t in ties.named.items()}
    made = [(ties.owner(labels), units[labels]) for labels in ties.made if labels.any()]
    return Channels(axes, made)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, ties: Ties, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ties = ties
        # A narrower layer has fewer groups. These layers have an attribute that can say so; the
        # number of groups of any other call is fixed.
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm)
        layers = [part for part in model.modules() if isinstance(part, kinds)]
        self.regroup = {
            id(layer.weight) for layer in layers if isinstance(layer.weight, nn.Parameter)
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Call | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        declared = func._schema.arguments  # noqa: SLF001
        call: Call = {a.name: a.default_value for a in declared if a.has_default_value()}
        call |= dict(zip((a.name for a in declared), args, strict=False)) | (kwargs or {})
        grouped = (call.get("groups") or call.get("group") or 1) > 1
        fixed = grouped and id(call.get("weight")) not in self.regroup
        rule = None if fixed else _rule(func)
        output = result[0] if isinstance(result, (tuple, list)) else result
        if rule and isinstance(output, Tensor) and output.ndim and output.numel():
            self.ties.label(output, rule(self.ties, call, output))
        else:
            for tensor in _tensors(call.values()):
                self.ties.whole(*self.ties.axes(tensor))
        return result


def _pointwise(ties: Ties, call: Call, output: Tensor) -> Axes:
    """Inputs broadcast: axes that are as long as the output's are tied."""
    inputs = [ties.axes(tensor) for tensor in _tensors(call.values())]
    labels = []
    for i in range(-output.ndim, 0):
        full = [axes[i] for axes in inputs if len(axes) >= -i and len(axes[i]) == output.shape[i]]
        for other in full[1:]:
            ties.tie(full[0], other)
        labels.append(full[0] if full else stay(output.shape[i]))
    return tuple(labels)


def _convolution(ties: Ties, call: Call, output: Tensor) -> Axes:
    x, weight, groups = ties.axes(call["input"]), ties.axes(call["weight"]), call["groups"]
    # Filters are (C_in, C_out / g, ...) if transposed, else (C_out, C_in / g, ...).
    reads, makes = weight[:2] if call["transposed"] else weight[1::-1]
    ties.whole(*x[2:], *weight[2:])
    if groups == 1:
        ties.tie(x[1], reads)
    else:
        # Group i reads its own C_in / g channels and makes its own C_out / g, and whole groups go;
        # in a depthwise convolution, each is one channel and all that is made of it.
        inputs, outputs = x[1].reshape(groups, -1), makes.reshape(groups, -1)
        ties.tie(inputs, inputs[:, :1])
        ties.tie(outputs, inputs[:, :1])
        ties.whole(reads)
    ties.made.append(makes)
    if call["bias"] is not None:
        ties.tie(ties.axes(call["bias"])[0], makes)
    return x[0], makes, *map(stay, output.shape[2:])


def _mm(ties: Ties, call: Call, _: Tensor) -> Axes:
    """A linear layer is `x @ weight.T`, by `mm` or `addmm`."""
    (rows, inner), (same, columns) = ties.axes(call["self"]), ties.axes(call["mat2"])
    ties.tie(inner, same)
    ties.made += [rows, columns]
    return rows, columns


def _addmm(ties: Ties, call: Call, output: Tensor) -> Axes:
    axes = _mm(ties, {"self": call["mat1"], "mat2": call["mat2"]}, output)
    ties.label(output, axes)
    return _pointwise(ties, {"self": call["self"], "product": output}, output)


def _batch_norm(ties: Ties, call: Call, _: Tensor) -> Axes:
    x = ties.axes(call["input"])
    tensors = list(_tensors(call.get(key) for key in _BATCH_NORM_TENSORS))
    for tensor in tensors:
        ties.tie(x[1], ties.axes(tensor)[0])
    if not tensors:
        ties.whole(x[1])  # nothing would tell a narrower layer how wide it is
    return x


def _group_norm(ties: Ties, call: Call, _: Tensor) -> Axes:
    """The channels of a group share their mean and variance: whole groups go."""
    x = ties.axes(call["input"])
    members = x[1].reshape(call["group"], -1)
    ties.tie(members, members[:, :1])
    for tensor in _tensors([call["weight"], call["bias"]]):
        ties.tie(x[1], ties.axes(tensor)[0])
    return x


def _spatial(count: int) -> Rule:
    """The rule of pooling and resizing, which mix the last `count` axes of each channel."""

    def rule(ties: Ties, call: Call, output: Tensor) -> Axes:
        x = ties.axes(call["self"])
        ties.whole(*x[-count:])
        return *x[:-count], *map(stay, output.shape[-count:])

    return rule


def _along(ties: Ties, call: Call, output: Tensor) -> Axes:
    """Reductions, softmax, slices: they mix the axes that `dim` names; the others pass."""
    x, dim = ties.axes(call["self"]), call.get("dim")
    dims = {i % len(x) for i in np.atleast_1d(dim)} if dim not in (None, []) else set(range(len(x)))
    ties.whole(*(x[i] for i in dims))
    if output.ndim == len(x):
        return tuple(stay(output.shape[i]) if i in dims else x[i] for i in range(len(x)))
    return tuple(x[i] for i in range(len(x)) if i not in dims)


def _slice(ties: Ties, call: Call, output: Tensor) -> Axes:
    whole = call["self"].shape == output.shape
    return ties.axes(call["self"]) if whole else _along(ties, call, output)


def _cat(ties: Ties, call: Call, output: Tensor) -> Axes:
    # PyTorch lets an empty vector stand beside tensors of any rank.
    inputs = [ties.axes(tensor) for tensor in call["tensors"] if tensor.ndim == output.ndim]
    labels = list(inputs[0])
    joined = call["dim"] % output.ndim
    for axes in inputs[1:]:
        for i in set(range(output.ndim)) - {joined}:
            ties.tie(labels[i], axes[i])
    labels[joined] = np.concatenate([axes[joined] for axes in inputs])
    return tuple(labels)


def _pad(ties: Ties, call: Call, _: Tensor) -> Axes:
    """Padding beside the channels, as in a ResNet's skip without projection, must stay."""
    labels, pad = list(ties.axes(call["self"])), call["pad"]
    for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        if min(before, after) < 0:
            ties.whole(labels[-i])
            labels[-i] = labels[-i][max(-before, 0) : len(labels[-i]) - max(-after, 0)]
        labels[-i] = np.pad(labels[-i], (max(before, 0), max(after, 0)))
    return tuple(labels)


def _expand(ties: Ties, call: Call, output: Tensor) -> Axes:
    return _pointwise(ties, {"self": call["self"]}, output)


def _repeat(ties: Ties, call: Call, output: Tensor) -> Axes:
    x = ties.axes(call["self"])
    x = (*(stay(1) for _ in range(output.ndim - len(x))), *x)
    return tuple(np.tile(labels, n) for labels, n in zip(x, call["repeats"], strict=True))


def _permute(ties: Ties, call: Call, output: Tensor) -> Axes:
    x = ties.axes(call["self"])
    order = list(call.get("dims", range(output.ndim)))
    if "dims" not in call and output.ndim > 1:
        i, j = call.get("dim0", 0), call.get("dim1", 1)
        order[i], order[j] = order[j], order[i]
    return tuple(x[i] for i in order)


def _reshape(ties: Ties, call: Call, output: Tensor) -> Axes:
    """Runs of axes are merged, then split.

    A merged index takes the label of the one axis that has labels. After the split, labels may vary
    along one new axis only. Where two axes have labels or vary (channels that are merged with
    others, shuffled, or cut into heads) the channels must stay.
    """
    x, shape = ties.axes(call["self"]), tuple(call["self"].shape)
    labels: list[Labels] = []
    for old, new in _runs(shape, tuple(output.shape)):
        sizes = [output.shape[i] for i in new]
        split = [stay(size) for size in sizes]
        labelled = [i for i in old if x[i].any()]
        if labelled:
            grid = x[labelled[0]].reshape([-1, *[1] * (old.stop - 1 - labelled[0])])
            merged = np.broadcast_to(grid, [shape[i] for i in old]).reshape(sizes)
            varies = [i for i in range(len(new)) if (merged != merged.take([0], i)).any()]
            if len(labelled) > 1 or len(varies) > 1 or not sizes:
                ties.whole(*(x[i] for i in labelled))
            else:
                i = varies[0] if varies else int(np.argmax(sizes))
                split[i] = np.moveaxis(merged, i, 0).reshape(sizes[i], -1)[:, 0]
        labels += split
    return tuple(labels)


def _runs(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[range, range]]:
    """The shortest runs of axes, from the left, that hold equally many elements on both sides."""
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[start:i])) != (b := math.prod(new[begin:j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        yield range(start, i), range(begin, j)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


_OPERATORS: dict[Rule, str] = {
    _addmm: "addmm",
    _along: "_log_softmax _softmax amax amin linalg_vector_norm logsumexp max mean min select std "
    "std_mean sum var var_mean",
    _batch_norm: "_native_batch_norm_legit _native_batch_norm_legit_no_training native_batch_norm",
    _cat: "cat",
    _convolution: "convolution",
    _expand: "expand",
    _group_norm: "native_group_norm",
    _mm: "mm",
    _pad: "constant_pad_nd",
    _permute: "permute t transpose",
    _pointwise: "_prelu_kernel _to_copy alias bernoulli clone copy detach empty_like full_like "
    "hardswish native_dropout ones_like rand_like randn_like rrelu_with_noise zeros_like",
    _repeat: "repeat",
    _reshape: "_reshape_alias _unsafe_view reshape squeeze unsqueeze view",
    _slice: "slice",
}
_RULES = {name: rule for rule, names in _OPERATORS.items() for name in names.split()}
_SPATIAL = re.compile(
    r"_?(adaptive_)?(avg|max)_pool\dd(_with_indices)?|(reflection|replication)_pad\dd"
    r"|_?upsample_[a-z]+\dd(_aa)?"
)


def _rule(func: Any) -> Rule | None:
    """The rule for an ATen operator; one that works in place has an underscore behind its name."""
    name = func.overloadpacket.__name__.rstrip("_")
    if torch.Tag.pointwise in func.tags:
        return _pointwise
    if _SPATIAL.fullmatch(name):
        return _spatial(int(re.findall(r"\d", name)[0]))
    return _RULES.get(name)
