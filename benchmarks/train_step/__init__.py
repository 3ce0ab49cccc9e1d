"""Benchmark of one training step of a device's network; see `__main__`."""
