"""A run whose devices are simulated in one process."""
