"""The device: trains what an order says with plain ONNX Runtime, and returns what it asks for.

Besides the standard library it needs `ondevice`, `wire` and a few packages (`pyproject.toml`,
dependencies), but never torch.
"""

import sys
from pathlib import Path

# Import our own `wire`, which lies beside this package, even if the current folder or the
# environment has another package of that name.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wire import stopping  # before onnxruntime, because importing wire turns off its reports

stopping.early("edge_agent", "edge-agent")
