"""What a device is and does, whoever does it: the edge agent, or the server that simulates devices.

Settings of a device, reading of its images, the work that an order asks for, and inference on a
photo. It imports nothing but `wire`, numpy, onnxruntime, safetensors and, for photos, Pillow.
"""

from wire import __version__  # wire comes before onnxruntime, whose reports it turns off

__all__ = ["__version__"]
