"""The training compiler: PyTorch module in, artifact for plain ONNX Runtime out."""

from wire import extras

extras.check("tools.export", ("onnx", "onnxscript", "torch"))

from tools.export.build import export
from tools.export.tracing.optimizers import Adam, Optimizer, Sgd

__all__ = ["Adam", "Optimizer", "Sgd", "export"]
