"""A run whose devices are simulated in one process."""

from typing import Literal

EngineName = Literal["torch", "onnx"]  # what trains simulated devices
