"""PyTorch definitions of the networks, the registry that makes them by name, and sub-models."""

from models.average import Average
from models.clip import Clip
from models.registry import SplitModel, build, freeze, inherit, input_shape, names, sources, try_out
from models.submodel import layout, narrow
from models.units import Units

__all__ = [
    "Average", "Clip", "SplitModel", "Units", "build", "freeze", "inherit", "input_shape", "layout",
    "names", "narrow", "sources", "try_out",
]  # fmt: skip
