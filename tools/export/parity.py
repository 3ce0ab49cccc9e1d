"""Does the compiled step do what PyTorch does? Five steps side by side after every export.

From one start, on the same random batches: PyTorch's modules, autograd and torch.optim in float32,
the same in float64, and the compiled graph in ONNX Runtime. Every parameter, buffer and optimizer
tensor must then satisfy

    max |onnx - torch32| <= 1e-4 * max(max |torch32|, 1e-6) + 4 * max |torch32 - torch64|

The second term is PyTorch's own rounding error after these steps. Without it no exporter could
pass: a convolution's bias before batch norm has gradient zero, in floats a rounding error, which
Adam divides by its own size, so that its sign decides where the bias goes; and a value on the edge
of a ReLU or on a tie of a max pooling falls to either side. Where float32 is well-conditioned the
term vanishes against the first.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models import SplitModel
from tools.export.optimizers import STEP, Optimizer
from wire.artifact import Manifest
from wire.errors import ExportError

STEPS = 5
TOLERANCE = 1e-4
FLOOR = 1e-6
NOISE = 4.0
LR = 0.01
ALPHA = 0.5
TEMPERATURE = 3.0

Array = NDArray[Any]
Named = dict[str, Array]


@dataclass(frozen=True)
class Difference:
    """The tensor that came nearest to its bound: largest difference, scale, share of the bound."""

    name: str
    largest: float
    scale: float
    share: float

    def __str__(self) -> str:
        return f"{self.name}: largest difference {self.largest:.2e}, largest value {self.scale:.2e}"


def check(
    module: nn.Module, optimizer: Optimizer, manifest: Manifest, folder: Path, start: Named
) -> Difference:
    """Run the comparison; all three graphs of the artifact in `folder` take part.

    Returns:
        The worst of all tensors.

    Raises:
        ExportError: a tensor differs by more than the bound; the message names it.
    """
    batches = _batches(manifest)
    single = _eager(module, optimizer, manifest, batches, torch.float32)
    double = _eager(module, optimizer, manifest, batches, torch.float64)
    compiled = _compiled(manifest, folder, batches, start)
    missing = set(single) - set(compiled)
    if missing:
        raise ExportError(f"the compiled step lacks {sorted(missing)}")
    differences = [_compare(n, compiled[n], single[n], double[n]) for n in sorted(single)]
    worst = max(differences, key=lambda difference: difference.share)
    if not worst.share <= 1:
        raise ExportError(
            f"{manifest.model.name}: the compiled step differs from PyTorch after {STEPS} steps: "
            f"{worst}, {worst.share:.1f} times the bound; nothing was written. Report the model, "
            f"or leave out the last operator added to it"
        )
    return worst


def _compare(name: str, got: Array, single: Array, double: Array) -> Difference:
    scale = float(np.abs(single).max())
    largest = float(np.abs(got.astype(np.float64) - single).max())
    noise = float(np.abs(single - double).max())
    bound = TOLERANCE * max(scale, FLOOR) + NOISE * noise
    share = largest / bound if np.isfinite(got).all() and np.isfinite(bound) else float("inf")
    return Difference(name, largest, scale, share)


def _batches(manifest: Manifest) -> list[Named]:
    random = np.random.default_rng(0)
    batch, classes = manifest.batch, manifest.model.classes
    return [
        {
            "x": random.standard_normal((batch, *manifest.model.input), dtype=np.float32),
            "y": random.integers(0, classes, batch),
            "teacher": 3 * random.standard_normal((batch, classes), dtype=np.float32),
        }
        for _ in range(STEPS)
    ]


def _eager(
    module: nn.Module, optimizer: Optimizer, manifest: Manifest, batches: Sequence[Named],
    dtype: torch.dtype,
) -> Named:  # fmt: skip
    module = copy.deepcopy(module).to(dtype).train()
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    reference = optimizer.reference(named.values(), LR)
    results: Named = {}
    for number, batch in enumerate(batches):
        x, teacher = torch.tensor(batch["x"], dtype=dtype), torch.tensor(batch["teacher"], dtype=dtype)
        y = torch.tensor(batch["y"])
        logits = module(x)
        value = F.cross_entropy(logits, y)
        if manifest.task == "distill":
            student = F.log_softmax(logits / TEMPERATURE, 1)
            target = F.softmax(teacher / TEMPERATURE, 1)
            kl = F.kl_div(student, target, reduction="batchmean")
            value = value + ALPHA * TEMPERATURE**2 * kl
        reference.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        reference.step()
        results[f"loss of step {number + 1}"] = value.detach().numpy()
        correct = (logits.argmax(1) == y).sum()
        results[f"correct of step {number + 1}"] = correct.numpy().astype(np.float64)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {spec.name: own[spec.name] for spec in manifest.state_of("parameter", "buffer")}
    tensors |= _optimizer_state(reference, named)
    module.eval()
    with torch.no_grad():
        x = torch.tensor(batches[0]["x"], dtype=dtype)
        tensors["logits of eval"] = module(x)
        if manifest.features is not None and isinstance(module, SplitModel):
            tensors["features of extract"], tensors["logits of extract"] = module.extract(x)
    return results | {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def _optimizer_state(
    reference: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """PyTorch's optimizer state under the manifest's names."""
    tensors: dict[str, Tensor] = {}
    words = {"momentum_buffer": "momentum", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    for name, parameter in named.items():
        state = reference.state[parameter]
        for key, word in words.items():
            if isinstance(state.get(key), Tensor):
                tensors[f"optim.{word}.{name}"] = state[key]
        if "step" in state:
            tensors[STEP] = state["step"]
    return tensors


def _compiled(manifest: Manifest, folder: Path, batches: Sequence[Named], start: Named) -> Named:
    settings = {"lr": LR, "alpha": ALPHA, "temperature": TEMPERATURE}
    scalars = {name: np.array(value, np.float32) for name, value in settings.items()}
    results: Named = {}
    state = dict(start)
    run = _session(manifest, folder, "train")
    for number, batch in enumerate(batches):
        out = run({**batch, **scalars, **state})
        state = {name: out[f"{name}.next"] for name in state}
        results[f"loss of step {number + 1}"] = out["loss"]
        results[f"correct of step {number + 1}"] = out["correct"]
    results |= state
    for graph in sorted(set(manifest.graphs) - {"train"}):
        out = _session(manifest, folder, graph)({"x": batches[0]["x"], **state})
        results |= {f"{name} of {graph}": value for name, value in out.items()}
    return results


def _session(manifest: Manifest, folder: Path, name: str) -> Callable[[Named], Named]:
    graph = manifest.graphs[name]
    session = onnxruntime.InferenceSession(
        folder / graph.file, providers=["CPUExecutionProvider"]
    )
    outputs = [spec.name for spec in graph.outputs]

    def run(values: Named) -> Named:
        feed = {spec.name: values[spec.name] for spec in graph.inputs}
        return dict(zip(outputs, session.run(outputs, feed), strict=True))

    return run
