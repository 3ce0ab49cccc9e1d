"""Measurements against named peers, each a command: `python -m benchmarks.train_step`."""
