"""What FedGKT needs besides the paper's algorithm.

Its state (`state`), the extractors (`extractors`), what devices have sent (`received`), and how
good its networks are (`evaluation`).
"""
