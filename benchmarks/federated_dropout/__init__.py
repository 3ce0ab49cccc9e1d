"""Benchmark of Federated Dropout: the paper's figures; see `__main__`."""
