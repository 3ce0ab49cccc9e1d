"""What FedGKT needs besides the paper's algorithm: its state, extractors, evaluation."""
