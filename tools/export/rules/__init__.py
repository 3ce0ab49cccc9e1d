"""How each ATen operator of a training step is written in ONNX operators."""

from tools.export.rules import borders, elementwise, indexing, layers, layout, reduction, resizing
from tools.export.rules.registry import RULES

__all__ = [
    "RULES",
    "borders",
    "elementwise",
    "indexing",
    "layers",
    "layout",
    "reduction",
    "resizing",
]
