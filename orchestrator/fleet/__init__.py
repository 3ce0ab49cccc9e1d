"""The fleet: who may take part, who is there, what is known of it, and its updates."""
