"""The training compiler: PyTorch module in, artifact for plain ONNX Runtime out."""

from wire import extras

extras.check("tools.export", ("onnx", "onnxscript", "torch"))

# Below the check, which names a missing package before it is imported.
from tools.export.build import export  # noqa: E402
from tools.export.tracing.optimizers import Adam, Optimizer, Sgd  # noqa: E402

__all__ = ["Adam", "Optimizer", "Sgd", "export"]
