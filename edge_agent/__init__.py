"""The device: trains what an order says with plain ONNX Runtime and returns what it asks for.

Imports nothing but `wire`, numpy, onnxruntime, safetensors and (for image folders) Pillow.
"""

from wire import stopping  # with wire before onnxruntime, whose reports it turns off

stopping.early("edge_agent", "edge-agent")

__version__ = "0.1.0"
