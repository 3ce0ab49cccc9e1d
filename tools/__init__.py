"""Tools that people run: the training compiler, and PyTorch's side of measurements."""

import sys
from os.path import dirname, realpath  # `pathlib` takes milliseconds to import

# Import our own `models` and `wire`; `orchestrator` says why.
sys.path.insert(0, dirname(dirname(realpath(__file__))))  # noqa: PTH120

from wire import early

early.listen("tools")
