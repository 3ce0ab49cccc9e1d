"""Tools that people run: the training compiler, and PyTorch's side of measurements."""

import sys
from pathlib import Path

# Import our own `models` and `wire`; `orchestrator` says why.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wire import stopping

stopping.early("tools")
