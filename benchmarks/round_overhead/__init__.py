"""Benchmark of what a round costs beyond training; see `__main__`."""
