"""The engine of simulated devices: PyTorch trains a stack of many at once.

K devices with models of the same shapes are one stacked model: parameters (K, ...), batches
(K, B, ...). The loss is the sum of the devices' losses, so each device gets its own gradient, and
elementwise optimizers (SGD, Adam) update the stack as they would update each device. A stack fills
a GPU; on a CPU one device at a time is faster (13 ms a step of `caldas_cnn` with a batch of 10,
stacked 21 to 29).

Batches come from `Start.batches`, as an agent's do: a simulated device sees the same samples in the
same order as an agent with the same data and seed.
"""

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.flop_counter import FlopCounterMode

from ondevice import views
from ondevice.engine import Extracted, Trained
from ondevice.images import Preprocess
from ondevice.order import Model, Start
from orchestrator.config import DeviceConfig
from orchestrator.training import distill, loss

AT_ONCE = {"cpu": 16, "cuda": 512}  # images per evaluation pass; 16 fit into a CPU's cache

# PyTorch's name of each optimizer tensor: its prefix in an artifact's state.
SLOTS = {
    "momentum_buffer": "optim.momentum.",
    "exp_avg": "optim.exp_avg.",
    "exp_avg_sq": "optim.exp_avg_sq.",
}
STEPS = "optim.step"  # how many steps Adam has done; all parameters share it


class TorchEngine:
    """The `Engine` of simulated devices that train the same model.

    Args:
        network: with the weights that a device begins with.
        config: batch, optimizer and normalization.
        device: the PyTorch device that computes.

    Attributes:
        model: for `order.begin`.
    """

    def __init__(self, network: nn.Module, config: DeviceConfig, device: torch.device) -> None:
        self._network, self._config, self._device = network, config, device
        self._preprocess = Preprocess(config.mean, config.std)
        # Counted once, and forgotten with the engine.
        self._flops = functools.cache(functools.partial(_flops, network, config))
        weights = distill.weights(network)
        state = {**weights, **_initial(network, config)}
        self.model = Model(
            input=config.input,
            classes=config.class_count,
            class_names=config.class_names,
            batch=config.batch,
            sent=tuple(sorted(weights)),
            initial=lambda: dict(state),
        )

    def train(self, starts: Sequence[Start]) -> list[Trained]:
        """Train all devices together; see `Engine.train`."""
        order, config, device = starts[0].order, self._config, self._device
        stack = _Stack(self._network, starts, device)
        anchor = [p.detach().clone() for p in stack.parameters]
        optimizer = _optimizer(stack.parameters, config, order.lr)
        _resume(optimizer, stack, starts, device)
        alpha = torch.tensor([[start.alpha] for start in starts], device=device)
        taught = bool(alpha.any())
        tallies = [np.zeros(2) for _ in starts]
        done: dict[int, dict[str, NDArray[Any]]] = {}
        batches = [self._batches(start, taught=taught) for start in starts]
        for number in range(max(start.steps for start in starts)):
            drawn = [next(each) for each in batches]
            x, y = _stacked([b.x for b in drawn], device), _stacked([b.y for b in drawn], device)
            teacher = _stacked([b.teacher for b in drawn], device) if taught else None
            logits = stack(x)
            each = loss.each(logits, y, teacher, alpha=alpha, temperature=order.temperature)
            losses = each.mean(1)
            if order.mu:
                pairs = zip(stack.parameters, anchor, strict=True)
                pulls = [(p - a).square().flatten(1).sum(1) for p, a in pairs]
                losses = losses + order.mu / 2 * torch.stack(pulls).sum(0)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            hits = (logits.argmax(2) == y).sum(1).tolist()
            for k, told in enumerate(zip(losses.tolist(), hits, strict=True)):
                if number < starts[k].steps:
                    if drawn[k].first:
                        tallies[k][:] = 0
                    tallies[k] += told
                if number + 1 == starts[k].steps:
                    done[k] = stack.weights(k) | _kept_by(optimizer, stack, k)
        flops = self._flops(train=True)
        return [
            Trained(done[k], loss=float(lost), correct=float(right), flops=flops)
            for k, (lost, right) in enumerate(tallies)
        ]

    @torch.inference_mode()
    def extract(
        self, start: Start, state: Mapping[str, NDArray[Any]], *, maps: bool
    ) -> Iterator[Extracted]:
        """Compute many batches at once, yield them one by one; see `Engine.extract`."""
        size = self._config.batch
        network: Any = copy.deepcopy(self._network)
        distill.load(network, {name: state[name] for name in self.model.sent})
        network.eval().to(self._device)
        flops = self._flops(train=False)
        at_once = (AT_ONCE[self._device.type] // size or 1) * size
        for view in start.order.views:
            for _, pixels, valid in views.batches(start.images, at_once, view):
                x = np.empty((valid, *self._config.input), np.float32)
                self._preprocess(pixels[:valid], out=x)
                shown = torch.from_numpy(x).to(self._device)
                shown = shown.contiguous(memory_format=torch.channels_last)
                outputs = network.extract(shown) if maps else (network(shown),)
                *features, logits = (output.cpu().numpy() for output in outputs)
                for at in range(0, valid, size):
                    chosen = slice(at, at + size)
                    part = np.ascontiguousarray(features[0][chosen]) if maps else None
                    yield Extracted(part, logits[chosen], flops)

    def _batches(self, start: Start, *, taught: bool) -> Iterator["_Batch"]:
        """The order's batches, then the last one for ever, since other devices may have more.

        If any device of the stack has a teacher (`taught`), devices without one get zeros.
        """
        config, labels, teacher = self._config, start.images.y, start.teacher
        x = np.empty((config.batch, *config.input), np.float32)
        if teacher is None:
            teacher = np.zeros((len(labels) if taught else 0, config.class_count), np.float32)
        for drawn in start.batches():
            self._preprocess(drawn.pixels, out=x)
            logits = teacher[drawn.indices] if taught else teacher
            batch = _Batch(x, labels[drawn.indices], logits, first=drawn.number == 0)
            yield batch
        while True:
            yield batch


class _Batch(NamedTuple):
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    teacher: NDArray[np.float32]
    first: bool  # of its epoch


class _Stack:
    """K copies of a model, each with its own weights; maps (K, B, ...) to logits (K, B, C)."""

    def __init__(
        self,
        network: nn.Module,
        starts: Sequence[Start],
        device: torch.device,
    ) -> None:
        self._network = copy.deepcopy(network).to(device).train()
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        sent = set(starts[0].model.sent)
        self._parts = {
            name: _stacked([start.state[name] for start in starts], device).requires_grad_(
                name in trained
            )
            for name in network.state_dict()
            if name in sent
        }
        self.trained = {name: part for name, part in self._parts.items() if name in trained}
        self.parameters = list(self.trained.values())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor
        if len(x) == 1:
            alone = {name: part.squeeze(0) for name, part in self._parts.items()}
            x = x[0].contiguous(memory_format=torch.channels_last)
            logits = functional_call(self._network, alone, (x,))[None]
        else:
            logits = vmap(lambda parts, x: functional_call(self._network, parts, (x,)))(
                self._parts, x
            )
        return logits

    def weights(self, k: int) -> dict[str, NDArray[Any]]:
        """Copies of the current parameters and buffers of device k."""
        return {name: _numpy(part[k]) for name, part in self._parts.items()}


def _stacked(arrays: Sequence[NDArray[Any]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    copied: NDArray[Any] = tensor.detach().cpu().numpy().copy()
    return copied


def _initial(network: nn.Module, config: DeviceConfig) -> dict[str, NDArray[np.float32]]:
    """The optimizer's tensors before the first step, named as in an artifact's state."""
    zeros = {
        name: np.zeros(tuple(p.shape), np.float32)
        for name, p in network.named_parameters()
        if p.requires_grad
    }
    if config.optimizer == "adam":
        slots = [SLOTS["exp_avg"], SLOTS["exp_avg_sq"]]
        found = {slot + name: zero for slot in slots for name, zero in zeros.items()}
        return {**found, STEPS: np.zeros((), np.float32)}
    if not config.momentum:
        return {}
    return {SLOTS["momentum_buffer"] + name: zero for name, zero in zeros.items()}


def _optimizer(
    parameters: Sequence[torch.Tensor], config: DeviceConfig, lr: float
) -> torch.optim.Optimizer:
    """The optimizer that the devices' artifact is compiled with; see `launch.artifacts`."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _resume(
    optimizer: torch.optim.Optimizer,
    stack: _Stack,
    starts: Sequence[Start],
    device: torch.device,
) -> None:
    """Continue from the devices' optimizer tensors; if all are zero, the optimizer starts fresh."""
    states = [start.state for start in starts]
    steps = float(states[0].get(STEPS, 0))
    for slot, prefix in SLOTS.items():
        for name, part in stack.trained.items():
            pieces = [state[prefix + name] for state in states if prefix + name in state]
            if pieces and (steps or any(piece.any() for piece in pieces)):
                optimizer.state[part][slot] = _stacked(pieces, device)
    for part in stack.trained.values() if steps else ():
        optimizer.state[part]["step"] = torch.tensor(steps)


def _kept_by(optimizer: torch.optim.Optimizer, stack: _Stack, k: int) -> dict[str, NDArray[Any]]:
    """The optimizer's tensors of device k, named as in an artifact's state."""
    found = {}
    for name, part in stack.trained.items():
        for slot, value in optimizer.state[part].items():
            if slot == "step":
                found[STEPS] = np.array(float(value), np.float32)
            elif value is not None:
                found[SLOTS[slot] + name] = _numpy(value[k])
    return found


def _flops(network: nn.Module, config: DeviceConfig, *, train: bool) -> int:
    """FLOPs of one batch of one device: a training step (forward and backward) or an evaluation."""
    one = copy.deepcopy(network).cpu().train(train)
    with FlopCounterMode(display=False) as counter:
        logits = one(torch.zeros(config.batch, *config.input))
        if train:
            logits.sum().backward()
    return int(counter.get_total_flops())
