"""Compile a module's training step into an artifact that plain ONNX Runtime runs."""

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from models import SplitModel
from tools.export import flops, parity
from tools.export.admission import admit
from tools.export.graph import Graph, Value
from tools.export.lower import lower
from tools.export.optimizers import Optimizer, Sgd
from tools.export.step import Task, Tensors, trace_eval, trace_train
from wire import artifact
from wire.artifact import Artifact, FileRef, Manifest, ModelInfo, Preprocess, Role, TensorSpec
from wire.errors import ExportError


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
) -> Artifact:
    """Compile, check against PyTorch, write.

    Args:
        module: x float32 (batch, *input_shape) -> logits float32 (batch, classes). It is copied,
            not changed; its present weights become the initial ones. A `SplitModel` also gets the
            graph that extracts feature maps.
        name: of the model, for people.
        classes: number of logits.
        input_shape: of one sample, channels first.
        batch: the fixed size of a batch.
        out: the folder to make; it must not exist.
        task: "distill" learns from labels and a teacher's logits, "classify" from labels alone.
        optimizer: `Sgd` (default) or `Adam`.
        mean: by channel, of x = (byte / 255 - mean) / std; default 0.5.
        std: likewise; default 0.25.
        keep_rate: of the sub-model that the module is, 1 for the whole.

    Raises:
        ExportError: the module cannot be compiled, or the compiled step is not PyTorch's. Nothing
            is left behind.
    """
    if out.exists():
        raise ExportError(f"{out}: exists; name a new folder, or remove this one")
    shape = tuple(input_shape)
    channels = shape[0] if shape else 0
    chosen = Sgd() if optimizer is None else optimizer
    preprocess = Preprocess(tuple(mean or [0.5] * channels), tuple(std or [0.25] * channels))
    module = copy.deepcopy(module).cpu()
    tensors = admit(module, name=name, classes=classes, shape=shape, batch=batch)
    compiler = _Compiler(module, tensors, chosen, task, (batch, *shape), classes)
    graphs = {"train": compiler.train(), "eval": compiler.evaluate(extract=False)}
    if isinstance(module, SplitModel):
        graphs["extract"] = compiler.evaluate(extract=True)
    start = {key: value.detach().numpy() for key, value in compiler.state.items()}
    files = {f"{key}.onnx": model.SerializeToString(deterministic=True) for key, model in graphs.items()}
    files[artifact.WEIGHTS] = save(start)
    features = None
    if "extract" in graphs:
        (extracted, _) = compiler.specs(graphs["extract"])[1]
        features = extracted.shape[1:]
    tables = {key: compiler.specs(model) for key, model in graphs.items()}
    manifest = Manifest(
        format=artifact.FORMAT,
        model=ModelInfo(name, classes, shape, keep_rate),
        task=task,
        batch=batch,
        preprocess=preprocess,
        features=features,
        optimizer=chosen.settings(),
        graphs={
            key: artifact.Graph(f"{key}.onnx", flops.count(model), *tables[key])
            for key, model in graphs.items()
        },
        state=tuple(
            TensorSpec(key, tuple(value.shape), "float32", compiler.roles[key])
            for key, value in compiler.state.items()
        ),
        producer={
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
            "torch": torch.__version__,
        },
        files={
            key: FileRef(hashlib.sha256(data).hexdigest(), len(data))
            for key, data in files.items()
        },
    )
    files[artifact.MANIFEST] = manifest.to_bytes()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for key, data in files.items():
            (folder / key).write_bytes(data)
        parity.check(module, chosen, manifest, folder, start)
        folder.chmod(0o755)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return artifact.open_artifact(out, manifest.digest)


class _Compiler:
    """Traces and lowers one module; knows the role of each of its tensors."""

    def __init__(
        self, module: nn.Module, tensors: Tensors, optimizer: Optimizer, task: Task,
        shape: tuple[int, ...], classes: int,
    ) -> None:  # fmt: skip
        self.module, self.tensors, self.optimizer, self.task = module, tensors, optimizer, task
        scalar = torch.ones(())
        self.batch = {
            "x": torch.zeros(shape),
            "y": torch.zeros(shape[0], dtype=torch.int64),
            "lr": scalar,
        }
        self.roles: dict[str, Role] = {"x": "batch", "y": "batch", "lr": "setting"}
        if task == "distill":
            teacher = torch.zeros(shape[0], classes)
            self.batch |= {"teacher": teacher, "alpha": scalar, "temperature": scalar}
            self.roles |= {"teacher": "batch", "alpha": "setting", "temperature": "setting"}
        self.moments = optimizer.initial(tensors.trained)
        self.state = {**tensors.parameters, **tensors.buffers, **self.moments}
        for role, names in (
            ("parameter", tensors.parameters),
            ("buffer", tensors.buffers),
            ("optimizer", self.moments),
        ):
            self.roles |= dict.fromkeys(names, role)  # type: ignore[arg-type]
        self.roles |= {f"{n}.next": self.roles[n] for n in self.state}
        self.roles |= {"loss": "metric", "correct": "metric"}
        self.roles |= {"logits": "result", "features": "result"}

    def train(self) -> onnx.ModelProto:
        """The graph of one training step."""
        traced, outputs = trace_train(
            self.module, self.tensors, self.task, self.optimizer, self.moments,
            list(self.batch.values()),
        )  # fmt: skip
        g = Graph()
        inputs = self._inputs(g, {**self.batch, **self.state})
        results = lower(g, traced, inputs)
        fixed = dict(zip(self.tensors.fixed, inputs[-len(self.tensors.fixed) :], strict=False))
        for name, value in zip(outputs, results, strict=True):
            if name not in self.tensors.fixed:
                g.output(name, value)
            elif value != fixed[name] and not name.endswith("num_batches_tracked"):
                raise ExportError(
                    f"buffer {name!r} changes in training, but only float32 buffers in the "
                    f"state_dict can; register it as one"
                )
        return g.build("train")

    def evaluate(self, *, extract: bool) -> onnx.ModelProto:
        """The graph of the evaluation mode: logits, or features and logits."""
        x = self.batch["x"]
        traced = trace_eval(self.module, self.tensors, x, extract=extract)
        g = Graph()
        own = {**self.tensors.parameters, **self.tensors.buffers}
        results = lower(g, traced, self._inputs(g, {"x": x, **own}))
        for name, value in zip(["features", "logits"][-len(results) :], results, strict=True):
            g.output(name, value)
        return g.build("extract" if extract else "eval")

    def _inputs(self, g: Graph, tensors: dict[str, Tensor]) -> list[Value]:
        """Inputs for all tensors, constants for the fixed ones."""
        inputs = [g.input(key, value.shape, value.dtype) for key, value in tensors.items()]
        fixed = self.tensors.fixed.values()
        return inputs + [g.constant(value.numpy(), value.dtype) for value in fixed]

    def specs(self, model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], ...]:
        """The table of a graph's inputs, and that of its outputs."""
        names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
        return tuple(
            tuple(
                TensorSpec(
                    info.name,
                    tuple(d.dim_value for d in info.type.tensor_type.shape.dim),
                    names[info.type.tensor_type.elem_type],  # type: ignore[arg-type]
                    self.roles[info.name],
                )
                for info in side
            )
            for side in (model.graph.input, model.graph.output)
        )
