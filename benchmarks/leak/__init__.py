"""Measures how much a FedGKT device's feature maps reveal; see `benchmarks.leak.__main__`."""
