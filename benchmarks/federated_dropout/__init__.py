"""Experiments with Federated Dropout: the paper's figures, and later ones; see `__main__`."""
