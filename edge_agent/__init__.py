"""The device: trains what an order says with plain ONNX Runtime and returns what it asks for.

Imports nothing but `wire`, numpy, onnxruntime, safetensors and (for image folders) Pillow.
"""

import sys
from pathlib import Path

# Import our own `wire`, which lies beside this package, and not a user's package of that name, in
# the current folder or installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wire import stopping  # with wire before onnxruntime, whose reports it turns off

stopping.early("edge_agent", "edge-agent")
