"""The device: trains what an order says with plain ONNX Runtime and returns what it asks for.

Imports nothing but `wire`, numpy, onnxruntime, safetensors and (for image folders) Pillow.
"""

import wire  # noqa: F401 - before onnxruntime, whose reports it turns off

__version__ = "0.1.0"
