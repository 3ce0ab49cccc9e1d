"""Tools that are run by people: the training compiler, and PyTorch's side of measurements."""

from wire import extras

extras.check("tools")
