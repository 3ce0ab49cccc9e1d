"""One training step of a device's network, against its peers; the command is in `__main__`."""
