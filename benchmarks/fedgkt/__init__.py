"""Experiments with FedGKT: those of the paper, and later ones; see `__main__`."""
