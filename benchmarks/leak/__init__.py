"""What a FedGKT device's feature maps give away; see `python -m benchmarks.leak --help`."""
