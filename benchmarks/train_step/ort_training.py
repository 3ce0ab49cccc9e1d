"""onnxruntime-training's own training step: `generate FOLDER`, then `train FOLDER THREADS`.

It runs in the environment that `environment` creates. 1.19.2 is the last version of the package.
Its SGD has neither momentum nor weight decay, so its step does a little less than the others'.
"""

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from benchmarks.train_step import setting
from tools import worker
from tools.worker import Prepared


def _skip_torch() -> None:
    """Let the package's parts be imported without its `__init__`.

    The `__init__` imports torch for parts that are not used here. That would add about 200 MB to
    the memory, which a device with this package does not need.
    """
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(onnxruntime.__file__).parent / "training")]
    sys.modules[package.__name__] = package


def generate(folder: Path) -> None:
    """Differentiate the forward graph ahead of time, as the package's on-device training does."""
    import onnx
    from onnxruntime.training import artifacts

    training = folder / "training"
    training.mkdir()
    model = onnx.load(folder / "forward.onnx")
    for node in model.graph.node:
        # The gradient reads the second output, which the package adds only in some graphs.
        if node.op_type == "SoftmaxCrossEntropyLoss" and len(node.output) == 1:
            node.output.append("log_prob")
    artifacts.generate_artifacts(
        model,
        requires_grad=json.loads((folder / "trained.json").read_text()),
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=training,
    )


def train(folder: Path, threads: int) -> Prepared:
    """Training steps on the generated artifacts; the batch lies in ONNX Runtime's memory."""
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    chosen, training = setting.load(folder), folder / "training"
    module = Module(
        training / "training_model.onnx",
        CheckpointState.load_checkpoint(training / "checkpoint"),
        session_options=options,
    )
    sgd = Optimizer(training / "optimizer_model.onnx", module)
    sgd.set_learning_rate(setting.LR)
    batch = chosen.load_batch(folder)
    inputs = [
        onnxruntime.OrtValue.ortvalue_from_numpy(batch[name]) for name in module.input_names()
    ]

    def once() -> float:
        loss = module(*inputs)
        sgd.step()
        module.lazy_reset_grad()
        return float(loss.numpy())

    return worker.steps(once, chosen.batch)


def main(arguments: Sequence[str]) -> int:
    """Run `generate`, or work as the contender."""
    _skip_torch()
    command, folder, *threads = arguments
    if command == "generate":
        generate(Path(folder))
        return 0
    return worker.serve(lambda: train(Path(folder), int(threads[0])))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
