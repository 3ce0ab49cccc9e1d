"""Experiments with FedGKT: those of the paper, and later ones; see `__main__`."""

import orchestrator  # noqa: F401 - before torch, for which it asks for huge pages
