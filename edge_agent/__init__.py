"""The device: trains what an order says with plain ONNX Runtime, and returns what it asks for.

Besides the standard library it needs `ondevice`, `wire` and a few packages (`pyproject.toml`,
dependencies), but never torch.
"""

import sys
from os.path import dirname, realpath  # `pathlib` takes milliseconds to import

# Import our own `wire`, which lies beside this package, even if the current folder or the
# environment has another package of that name.
sys.path.insert(0, dirname(dirname(realpath(__file__))))  # noqa: PTH120

from wire import early  # before onnxruntime, because importing wire turns off its reports

early.listen("edge_agent", "edge-agent")
