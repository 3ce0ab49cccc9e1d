"""Benchmark of the payload codecs: their bits, errors and speed; see `__main__`."""
