"""Codecs of payloads: their bits, errors and speed; the command is in `__main__`."""
