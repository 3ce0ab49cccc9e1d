"""PyTorch definitions of the networks, the registry that makes them by name, and sub-models."""

from models.average import Average
from models.clip import Clip
from models.registry import (
    SplitModel,
    build,
    freeze,
    inherit,
    input_shape,
    names,
    sources,
    try_out,
)
from models.submodel import layout, narrow
from models.units import Layout, Units, choose, cut, digest, kept_widths, paste, places

__all__ = [
    "Average",
    "Clip",
    "Layout",
    "SplitModel",
    "Units",
    "build",
    "choose",
    "cut",
    "digest",
    "freeze",
    "inherit",
    "input_shape",
    "kept_widths",
    "layout",
    "names",
    "narrow",
    "paste",
    "places",
    "sources",
    "try_out",
]
