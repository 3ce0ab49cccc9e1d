"""What a device does, whoever does it: the edge agent, or the server that simulates devices.

It holds a device's settings, reads its images, does the work of an order, and classifies photos. It
needs `wire`, numpy, onnxruntime, safetensors and, for photos, Pillow.
"""

from wire import __version__  # before onnxruntime, because importing wire turns off its reports

__all__ = ["__version__"]
