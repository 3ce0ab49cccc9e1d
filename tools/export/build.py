"""Compile a module's training step into an artifact that plain ONNX Runtime runs."""

import contextlib
import copy
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from safetensors.numpy import save
from torch import nn

from models import SplitModel
from tools.export import parity, plan
from tools.export.admission import admit
from tools.export.compiler import Compiler
from tools.export.graphs.cost import costs, flops
from tools.export.graphs.program import Program
from tools.export.tracing.optimizers import Optimizer, Sgd
from tools.export.tracing.step import Extras, Task
from wire.artifact import Artifact, open_artifact
from wire.errors import ExportError
from wire.manifest import (
    FORMAT,
    MANIFEST,
    WEIGHTS,
    FileRef,
    Graph,
    Manifest,
    ModelInfo,
    Preprocess,
    TensorSpec,
)


def export(
    module: nn.Module,
    *,
    name: str,
    classes: int,
    input_shape: Sequence[int],
    batch: int,
    out: Path,
    task: Task = "distill",
    optimizer: Optimizer | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_rate: float = 1.0,
    micro_batches: int = 1,
    memory_mb: float | None = None,
    proximal: bool = False,
    class_names: Sequence[str] = (),
) -> Artifact:
    """Compile a module's training step, check it against PyTorch, and write the artifact.

    Args:
        module: x float32 (batch, *input_shape) -> logits float32 (batch, classes). It is copied,
            not changed; its present weights become the initial ones. A `SplitModel` also gets the
            graph that extracts feature maps.
        name: the model's name, for people.
        classes: number of logits.
        input_shape: shape of one sample, channels first.
        batch: the fixed size of a batch.
        out: the folder to make; it must not exist.
        task: "distill" learns from labels and a teacher's logits, "classify" from labels alone.
        optimizer: `Sgd` (default) or `Adam`.
        mean: one number a channel, in x = (byte / 255 - mean) / std; default 0.5.
        std: likewise; default 0.25.
        keep_rate: share of the units that the module has of a whole network; 1 if it is whole.
        micro_batches: parts of a batch that run one after the other before the optimizer's step;
            batch norm normalizes each part by itself.
        memory_mb: the most memory that the agent's process may take while it trains, in 10^6 bytes,
            without its images. To fit, activations are computed again, and if that is not enough
            the batch is split into more parts. See `tools.export.plan`.
        proximal: add FedProx's proximal term to the loss; its weight `mu` is an input of the step.
        class_names: in the order of the logits; devices find their own classes among them.

    Raises:
        ExportError: the module cannot be compiled, or the compiled step is not PyTorch's. Nothing
            is left behind.
    """
    if out.exists():
        raise ExportError(f"{out}: exists; name a new folder, or remove this one")
    shape, chosen = tuple(input_shape), Sgd() if optimizer is None else optimizer
    module = copy.deepcopy(module).cpu()
    tensors = admit(module, name=name, classes=classes, shape=shape, batch=batch)
    try:
        info = ModelInfo(name, classes, shape, float(keep_rate), tuple(class_names))
        preprocess = Preprocess(
            tuple(map(float, [0.5] * shape[0] if mean is None else mean)),
            tuple(map(float, [0.25] * shape[0] if std is None else std)),
        )
        preprocess.check(channels=shape[0])
    except ValueError as fault:
        raise ExportError(f"{name}: {fault}") from fault

    def compile_for(parts: int) -> Compiler:
        if parts > 1:
            admit(module, name=name, classes=classes, shape=shape, batch=batch // parts)
        return Compiler(
            module, tensors, optimizer=chosen, task=task, shape=(batch, *shape), classes=classes,
            extras=Extras(parts, proximal),
        )  # fmt: skip

    budget = None if memory_mb is None else int(memory_mb * 1e6)
    try:
        chosen_plan = plan.fit(compile_for, batch=batch, micro_batches=micro_batches, budget=budget)
    except ExportError as fault:
        reason = str(fault).removeprefix(f"{name}: ")  # admission names the module by itself
        raise ExportError(f"{name}: {reason}") from fault
    compiler = chosen_plan.compiler
    programs = {"train": chosen_plan.program, "eval": compiler.evaluate(extract=False)}
    if isinstance(module, SplitModel):
        programs["extract"] = compiler.evaluate(extract=True)
    start = {key: value.detach().numpy() for key, value in compiler.state.items()}
    files = {
        f"{key}.onnx": program.model().SerializeToString(deterministic=True)
        for key, program in programs.items()
    }
    files[WEIGHTS] = save(start)
    try:
        manifest = _manifest(chosen_plan, programs, files, info, preprocess)
    except ValueError as fault:
        raise ExportError(f"{name}: {fault}") from fault
    files[MANIFEST] = manifest.to_bytes()
    with _folder(out) as folder:
        for key, data in files.items():
            (folder / key).write_bytes(data)
        parity.check(module, chosen, manifest, folder, start)
    return open_artifact(out, manifest.digest)


def _manifest(
    chosen: plan.Plan,
    programs: Mapping[str, Program],
    files: Mapping[str, bytes],
    info: ModelInfo,
    preprocess: Preprocess,
) -> Manifest:
    compiler = chosen.compiler
    graphs = {
        key: Graph(
            f"{key}.onnx",
            flops(program),
            *compiler.tables(program),
            *costs(program),
        )
        for key, program in programs.items()
    }
    return Manifest(
        format=FORMAT,
        model=info,
        task=compiler.task,
        batch=compiler.batch["x"].shape[0] * compiler.extras.micro_batches,
        micro_batches=compiler.extras.micro_batches,
        memory=chosen.memory,
        preprocess=preprocess,
        features=graphs["extract"].outputs[0].shape[1:] if "extract" in graphs else None,
        optimizer=compiler.optimizer.settings(),
        graphs=graphs,
        state=tuple(
            TensorSpec(key, tuple(value.shape), "float32", compiler.role(key))
            for key, value in compiler.state.items()
        ),
        producer={
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
        },
        files={
            key: FileRef(hashlib.sha256(data).hexdigest(), len(data)) for key, data in files.items()
        },
    )


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`: renamed to it in the end, or removed if anything fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder)
        raise
