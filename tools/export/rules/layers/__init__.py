"""Rules for the layers of a network, forward and backward."""

from tools.export.rules.layers import activation, attention, convolution, normalization, pooling

__all__ = ["activation", "attention", "convolution", "normalization", "pooling"]
