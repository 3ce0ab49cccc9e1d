"""How each ATen operator of a training step is written in standard ONNX operators."""

from tools.export.rules import convolution, elementwise, layout, normalization, pooling, reduction
from tools.export.rules.registry import RULES

__all__ = [
    "RULES",
    "convolution",
    "elementwise",
    "layout",
    "normalization",
    "pooling",
    "reduction",
]
