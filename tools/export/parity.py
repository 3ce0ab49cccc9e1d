"""Does the compiled step do what PyTorch does? Five steps side by side after every export.

PyTorch's own modules, autograd and torch.optim train for five steps on random batches. The compiled
step runs each of them from the same state, by the agent's own trainer. After each, every parameter,
buffer and optimizer tensor must satisfy

    max |onnx - torch| <= 1e-4 * max(max |torch|, 1e-6) + 4 * noise

where noise is the largest difference between that PyTorch step and three more, whose images and
weights are multiplied by 1 + 1e-6 * N(0, 1). It is nearly 0 for tensors that depend smoothly on
them, such as the running statistics. It is larger where two correct programs may differ. First, an
activation within a rounding error of 0 falls to either side of a ReLU, and one such flip among the
1.7 million of ResNet-8 at batch 8 moves a filter's gradient by 0.8 %. Second, a convolution's bias
before batch norm has gradient 0, in floats a rounding error, which Adam divides by its own size.

Each step starts anew from PyTorch's state because training is chaotic. If ResNet-19 under Adam runs
freely for five steps, such a perturbation moves its gradients as far as they are large, and no
comparison would say anything.

The perturbed steps have about thirty times as many flips as ONNX Runtime has. It may still have one
where they have none; then other batches are tried, three in all. A wrong rule fails on each.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models import SplitModel
from ondevice.trainer import Inference, TrainStep
from tools.export.tracing.optimizers import STEP, Optimizer
from tools.export.tracing.step import GRADIENT
from wire.artifact import Artifact, open_artifact
from wire.errors import ExportError
from wire.manifest import ANCHOR, Manifest

STEPS = 5
TOLERANCE = 1e-4
FLOOR = 1e-6
PERTURBATION = 1e-6
PERTURBED_RUNS = 3
NOISE = 4.0
TRIALS = 3
LR = 0.01
ALPHA = 0.5
TEMPERATURE = 3.0
MU = 0.1

Array = NDArray[Any]
Named = dict[str, Array]

_SETTINGS = {
    name: np.array(value, np.float32)
    for name, value in {"lr": LR, "alpha": ALPHA, "temperature": TEMPERATURE, "mu": MU}.items()
}


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from PyTorch's: largest difference, scale, share of the bound."""

    name: str
    largest: float
    scale: float
    share: float

    def __str__(self) -> str:
        return f"{self.name}: largest difference {self.largest:.2e}, largest value {self.scale:.2e}"


def check(
    module: nn.Module, optimizer: Optimizer, manifest: Manifest, folder: Path, start: Named
) -> Difference:
    """Compare all graphs of the artifact in `folder` to PyTorch.

    Returns:
        The difference of the tensor that is nearest to its bound.

    Raises:
        ExportError: a tensor differs by more than the bound; the message names it.
    """
    with _one_thread():
        for trial in range(TRIALS):
            worst = _trial(module, optimizer, manifest, folder, start, seed=trial)
            if worst.share <= 1:
                return worst
    raise ExportError(
        f"{manifest.model.name}: the compiled step differs from PyTorch after {STEPS} steps: "
        f"{worst}, {worst.share:.1f} times the bound; nothing was written. Report the model, or "
        f"leave out the last operator added to it"
    )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Within the block, PyTorch has one thread: results must not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trial(
    module: nn.Module, optimizer: Optimizer, manifest: Manifest, folder: Path, start: Named, *,
    seed: int,
) -> Difference:  # fmt: skip
    random = np.random.default_rng(seed)
    artifact = open_artifact(folder)
    compiled_step = TrainStep(artifact, start, threads=1, flush_denormals=False)
    module = copy.deepcopy(module).train()
    trained = [p for p in module.parameters() if p.requires_grad]
    eager = _Eager(module, optimizer.reference(trained, LR), manifest)
    differences = []
    state = start
    for step in range(STEPS):
        batch = _batch(manifest, random)
        others = []
        for _ in range(PERTURBED_RUNS):
            near = {**batch, "x": batch["x"] * _near_one(random, batch["x"].shape)}
            others.append(copy.deepcopy(eager).perturbed(random).step(near))
        exact = eager.step(batch)
        compiled = _run(compiled_step, batch, state)
        state = {name: exact[name] for name in state}
        compiled |= _evaluate(artifact, batch["x"][: manifest.micro_batch], state)
        if set(exact) != set(compiled):
            odd = sorted(set(exact) ^ set(compiled))
            raise ExportError(f"{manifest.model.name}: only one side has the tensors {odd}")
        differences += [
            _compare(f"{name} at step {step + 1}", compiled[name], value, [o[name] for o in others])
            for name, value in exact.items()
        ]
    return max(differences, key=lambda difference: difference.share)


def _run(step: TrainStep, batch: Named, state: Named) -> Named:
    """The state and the metrics after one compiled step from this state."""
    for name, view in step.state.items():
        view[...] = state[name]
    for name, buffer in step.inputs.items():
        buffer[...] = batch[name] if name in batch else _SETTINGS[name]
    step()
    new_state = {name: view.copy() for name, view in step.state.items()}
    return new_state | {"loss": step.loss.copy(), "correct": step.correct.copy()}


def _evaluate(artifact: Artifact, x: Array, state: Named) -> Named:
    """The outputs of the graphs for evaluation, given a micro-batch."""
    outputs: Named = {}
    for name in sorted(set(artifact.manifest.graphs) - {"train"}):
        run = Inference(artifact, name, state, threads=1, flush_denormals=False)
        run.x[...] = x
        run()
        outputs |= {f"{key} of {name}": value for key, value in run.outputs.items()}
    return outputs


def _near_one(random: np.random.Generator, shape: Sequence[int]) -> Array:
    return 1 + np.float32(PERTURBATION) * random.standard_normal(shape, dtype=np.float32)


def _compare(name: str, got: Array, exact: Array, others: Sequence[Array]) -> Difference:
    scale = float(np.abs(exact).max())
    largest = float(np.abs(got - exact).max())
    noise = max(float(np.abs(other - exact).max()) for other in others)
    bound = TOLERANCE * max(scale, FLOOR) + NOISE * noise
    share = largest / bound if np.isfinite(largest) and np.isfinite(bound) else float("inf")
    return Difference(name, largest, scale, share)


def _batch(manifest: Manifest, random: np.random.Generator) -> Named:
    batch, classes = manifest.batch, manifest.model.classes
    return {
        "x": random.standard_normal((batch, *manifest.model.input), dtype=np.float32),
        "y": random.integers(0, classes, batch),
        "teacher": 3 * random.standard_normal((batch, classes), dtype=np.float32),
    }


class _Eager:
    """A module and its optimizer in PyTorch."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, manifest: Manifest
    ) -> None:
        self.module, self.optimizer, self.manifest = module, optimizer, manifest
        parameters = dict(module.named_parameters())
        self.anchors = {
            spec.name: parameters[spec.name.removeprefix(ANCHOR)].detach().clone()
            for spec in manifest.state
            if spec.name.startswith(ANCHOR)
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Eager":
        module, optimizer = copy.deepcopy((self.module, self.optimizer), memo)
        twin = _Eager(module, optimizer, self.manifest)
        twin.anchors = self.anchors
        return twin

    def perturbed(self, random: np.random.Generator) -> "_Eager":
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.mul_(torch.tensor(_near_one(random, parameter.shape)))
        return self

    def step(self, batch: Named) -> Named:
        """The state and the metrics after one step, and the outputs of evaluation then."""
        parts = self.manifest.micro_batches
        samples = [torch.tensor(batch[key]).chunk(parts) for key in ("x", "y", "teacher")]
        self.module.train()
        self.optimizer.zero_grad()
        loss, correct = torch.zeros(()), torch.zeros(())
        for x, y, teacher in zip(*samples, strict=True):
            logits = self.module(x)
            objective = F.cross_entropy(logits, y)
            if self.manifest.task == "distill":
                student = F.log_softmax(logits / TEMPERATURE, 1)
                target = F.softmax(teacher / TEMPERATURE, 1)
                kl = F.kl_div(student, target, reduction="batchmean")
                objective = objective + ALPHA * TEMPERATURE**2 * kl
            (objective / parts).backward()  # type: ignore[no-untyped-call]
            loss = loss + objective.detach() / parts
            correct = correct + (logits.argmax(1) == y).sum()
        if self.anchors:
            loss = loss + self._pull()
        self.optimizer.step()
        tensors = {"loss": loss, "correct": correct, **self._state()}
        self.module.eval()
        x = samples[0][0]
        with torch.no_grad():
            tensors["logits of eval"] = self.module(x)
            if isinstance(self.module, SplitModel):
                tensors["features of extract"], tensors["logits of extract"] = self.module.extract(
                    x
                )
        return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}

    def _pull(self) -> Tensor:
        """The proximal term, its gradient added to the parameters'."""
        parameters = dict(self.module.named_parameters())
        term = torch.zeros(())
        for name, anchor in self.anchors.items():
            term = term + MU / 2 * (parameters[name.removeprefix(ANCHOR)] - anchor).square().sum()
        term.backward()  # type: ignore[no-untyped-call]
        return term.detach()

    def _state(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimizer's state under the manifest's names."""
        parameters = dict(self.module.named_parameters())
        named = {**parameters, **dict(self.module.named_buffers())}
        tensors = {
            spec.name: named[spec.name] for spec in self.manifest.state_of("parameter", "buffer")
        }
        tensors |= self.anchors
        words = {"momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
        waiting = {spec.name for spec in self.manifest.state_of("optimizer")}
        for name, parameter in parameters.items():
            if GRADIENT + name in waiting and parameter.grad is not None:
                tensors[GRADIENT + name] = parameter.grad
            state = self.optimizer.state.get(parameter, {})
            for key, word in words.items():
                if isinstance(state.get(key), Tensor):
                    tensors[f"optim.{word}.{name}"] = state[key]
            if "step" in state:
                tensors[STEP] = state["step"]
        return tensors
