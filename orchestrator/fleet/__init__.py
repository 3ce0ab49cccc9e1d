"""The fleet: which devices may take part, which are there, what is known of them, their updates."""
