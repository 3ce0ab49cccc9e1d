"""Before the first round: check the configuration, compile the networks, start the broker."""
