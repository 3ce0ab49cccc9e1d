"""Training and inference of an artifact by stock ONNX Runtime.

Only this file and `predict`, which runs exported networks, import ONNX Runtime.

The training graph is one functional step: state in, state out. The state is one float32 vector, and
the graph reads and writes ranges of it. Two such vectors take turns: one run reads A and writes B,
the next reads B and writes A. Both are bound once through IOBinding, so that a step copies nothing
and no reader can meet a value of the wrong step. The data pipeline writes batches straight into the
bound input buffers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ondevice import graphs
from ondevice.denormals import Denormals
from wire.artifact import Artifact
from wire.errors import ArtifactError
from wire.manifest import ANCHOR, Graph, TensorSpec

Array = NDArray[Any]
Floats = NDArray[np.float32]
State = dict[str, Array]

_TURNS = (np.zeros((), np.float32), np.ones((), np.float32))
# If onnxruntime-gpu is installed, the device trains on its GPU.
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class TrainStep:
    """The training step of an artifact, with the state it works on.

    Args:
        artifact: opened and verified.
        state: every state tensor of the artifact by name; copied.
        threads: number for each operator; 0 takes all cores.
        flush_denormals: treat numbers under 1.2e-38 as 0 within a step; see `ondevice.denormals`.
        profile: prefix of the file to which `end_profile` writes the time of each node; ONNX
            Runtime adds a time stamp. None writes nothing.

    Attributes:
        inputs: the bound buffers to write before a step, for a whole batch of B samples: `x`
            (B, *input) float32, `y` (B,) int64, and for distillation `teacher` (B, C) float32; and
            the scalars `lr`, `alpha`, `temperature`, `mu` (of a proximal term), arrays of shape ().
        loss, correct: results of the last step, arrays of shape ().

    Raises:
        ArtifactError: `state` lacks a tensor of the artifact or has it in another shape or dtype,
            or ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        artifact: Artifact,
        state: Mapping[str, Array],
        *,
        threads: int,
        flush_denormals: bool = True,
        profile: Path | None = None,
    ) -> None:
        manifest = artifact.manifest
        _check_state(manifest.state, state)
        graph = manifest.graphs["train"]
        self._denormals = Denormals(flush=flush_denormals)
        self._session = _session(
            artifact, graph, threads, flush_denormals=flush_denormals, profile=profile
        )
        self._manifest = manifest
        # A proximal term pulls toward the weights with which this training begins.
        sources = [spec.name.removeprefix(ANCHOR) for spec in manifest.state]
        vector = np.concatenate([state[name].reshape(-1) for name in sources])
        self._vectors = (vector, vector.copy())
        parts = manifest.micro_batches
        self.inputs: State = {
            spec.name: np.zeros((spec.shape[0] * parts, *spec.shape[1:]), spec.dtype)
            if spec.role == "batch"
            else np.zeros(spec.shape, spec.dtype)
            for spec in graph.inputs
            if manifest.place_of(spec) is None and spec.name not in {"first", "last"}
        }
        self.loss, self.correct = np.zeros((), np.float32), np.zeros((), np.float32)
        self._metrics = np.zeros((parts, 2), np.float32)
        # One binding for each micro-batch and direction between the vectors.
        self._bindings = [
            [
                _bind(
                    self._session,
                    graph,
                    self._part(graph.inputs, part) | self._ranges(graph.inputs, source),
                    {"loss": self._metrics[part, :1], "correct": self._metrics[part, 1:]}
                    | self._ranges(graph.outputs, target),
                )
                for source, target in (self._vectors, self._vectors[::-1])
            ]
            for part in range(parts)
        ]
        self._current = 0

    def _part(self, specs: Sequence[TensorSpec], part: int) -> State:
        """The inputs of one micro-batch: views of its samples, the scalars, `first` and `last`."""
        turns = {"first": part == 0, "last": part == self._manifest.micro_batches - 1}
        found: State = {name: _TURNS[int(turn)] for name, turn in turns.items()}
        for spec in specs:
            if spec.name in self.inputs:
                whole = self.inputs[spec.name]
                size = spec.shape[0] if spec.role == "batch" else 0
                found[spec.name] = whole[part * size :][:size] if size else whole
        return found

    def _ranges(self, specs: Sequence[TensorSpec], vector: Floats) -> State:
        """Views of the state vector, for each of the specs that is a range of it."""
        places = ((spec, self._manifest.place_of(spec)) for spec in specs)
        return {
            spec.name: vector[start : start + spec.size].reshape(spec.shape)
            for spec, start in places
            if start is not None
        }

    def __call__(self) -> None:
        """Do one step on the contents of the input buffers."""
        with self._denormals:
            for bindings in self._bindings:
                self._session.run_with_iobinding(bindings[self._current])
                self._current = 1 - self._current
        self.loss[...], self.correct[...] = self._metrics.sum(axis=0)

    def end_profile(self) -> Path:
        """Write the profile; return the path of its file."""
        return Path(self._session.end_profiling())

    @property
    def state(self) -> State:
        """The current state: views that later steps overwrite."""
        return self._ranges(self._manifest.state, self._vectors[self._current])


class Inference:
    """The artifact's `extract` or `eval` graph with fixed weights.

    Attributes:
        x: the bound input buffer, (B, *input) float32.
        outputs: the bound output buffers by name: `logits`, and for `extract` also `features`.
        flops: FLOPs of one pass.
    """

    def __init__(
        self,
        artifact: Artifact,
        kind: str,
        state: Mapping[str, Array],
        *,
        threads: int,
        flush_denormals: bool = True,
    ) -> None:
        if kind not in artifact.manifest.graphs:
            raise ArtifactError(
                f"artifact {artifact.digest:.12} ({artifact.manifest.model.name}) has no {kind!r} "
                "graph; features come only from split models such as resnet8"
            )
        graph = artifact.manifest.graphs[kind]
        self.flops = graph.flops
        self._denormals = Denormals(flush=flush_denormals)
        self._session = _session(artifact, graph, threads, flush_denormals=flush_denormals)
        self.outputs: State = {o.name: np.empty(o.shape, o.dtype) for o in graph.outputs}
        inputs = {
            spec.name: np.zeros(spec.shape, spec.dtype)
            if spec.role == "batch"
            else state[spec.name]
            for spec in graph.inputs
        }
        self.x: Floats = inputs["x"]
        self._binding = _bind(self._session, graph, inputs, self.outputs)

    def __call__(self) -> None:
        """Do one pass over the contents of `x`."""
        with self._denormals:
            self._session.run_with_iobinding(self._binding)


def _session(
    artifact: Artifact,
    graph: Graph,
    threads: int,
    *,
    flush_denormals: bool,
    profile: Path | None = None,
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The exporter has fused and ordered the nodes: run them as they stand. The order keeps few
    # tensors alive at a time, and further fusion by onnxruntime would save no time.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # With a memory pattern, a planned block for all tensors comes on top of what the first run took
    # from the arena. With reuse, a buffer stays allocated between its uses, from the forward pass
    # to the backward pass. The arena alone needs the least memory.
    options.enable_mem_pattern = False
    options.enable_mem_reuse = False
    # This holds for the session's own threads; `Denormals` sets the caller's.
    options.add_session_config_entry("session.set_denormal_as_zero", str(int(flush_denormals)))
    # Threads spin between the operators of a run, because these pauses are too short for sleep.
    # They stop when the run ends, because a Pi often shares its cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Otherwise ONNX Runtime takes bytes with a certain mark for its own format, which is unchecked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    offered = ort.get_available_providers()
    path = artifact.folder / graph.file
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise ArtifactError(f"{path}: cannot be read ({fault.strerror})") from fault
    graphs.check(content, f"artifact {artifact.digest:.12}: {graph.file}")
    try:
        with Denormals(flush=flush_denormals):  # the first session sets it for this thread
            return ort.InferenceSession(
                content,
                options,
                providers=[provider for provider in _PROVIDERS if provider in offered],
            )
    except Exception as fault:  # onnxruntime has an exception class for each status code
        raise ArtifactError(
            f"artifact {artifact.digest:.12}: onnxruntime {ort.__version__} cannot load "
            f"{graph.file}: {fault}; export it again with a matching version"
        ) from fault


def _bind(
    session: ort.InferenceSession,
    graph: Graph,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
) -> ort.IOBinding:
    """Bind numpy's own memory, so that nothing is copied; the caller keeps the arrays alive."""
    binding = session.io_binding()
    for spec in graph.inputs:
        array = inputs[spec.name]
        binding.bind_input(spec.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for spec in graph.outputs:
        array = outputs[spec.name]
        binding.bind_output(spec.name, "cpu", 0, array.dtype, spec.shape, array.ctypes.data)
    return binding


def _check_state(specs: Sequence[TensorSpec], state: Mapping[str, Array]) -> None:
    for spec in specs:
        if spec.name not in state:
            raise ArtifactError(f"state tensor {spec.name!r} of the artifact is missing")
        array = state[spec.name]
        if array.shape != spec.shape or array.dtype.name != spec.dtype:
            raise ArtifactError(
                f"state tensor {spec.name!r}: expected {spec.dtype} {list(spec.shape)}, got "
                f"{array.dtype.name} {list(array.shape)}"
            )
