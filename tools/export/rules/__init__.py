"""How each ATen operator of a training step is written in standard ONNX operators."""

from tools.export.rules import (
    activation,
    attention,
    borders,
    convolution,
    elementwise,
    indexing,
    layout,
    normalization,
    pooling,
    reduction,
    resizing,
)
from tools.export.rules.registry import RULES

__all__ = [
    "RULES",
    "activation",
    "attention",
    "borders",
    "convolution",
    "elementwise",
    "indexing",
    "layout",
    "normalization",
    "pooling",
    "reduction",
    "resizing",
]
