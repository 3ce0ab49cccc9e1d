"""PyTorch definitions of the networks, and the registry that makes them by name."""

from models.registry import SplitModel, build, input_shape, names

__all__ = ["SplitModel", "build", "input_shape", "names"]
