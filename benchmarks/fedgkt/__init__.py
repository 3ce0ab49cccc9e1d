"""FedGKT: the paper's experiments and what came after; see `__main__`."""
