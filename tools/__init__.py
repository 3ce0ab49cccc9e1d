"""Tools that are run by people: the training compiler, and PyTorch's side of measurements."""

from wire import stopping

stopping.early("tools")
