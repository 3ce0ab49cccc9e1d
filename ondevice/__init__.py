"""The work of a device, used by the edge agent and by the server when it simulates devices.

It holds a device's settings, reads its images, does the work of an order, and classifies photos. It
needs `wire`, numpy, onnxruntime, safetensors and, for photos, Pillow.
"""

from wire import __version__  # before onnxruntime: wire turns off onnxruntime's reports

__all__ = ["__version__"]
