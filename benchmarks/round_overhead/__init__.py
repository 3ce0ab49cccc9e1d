"""What a round costs beyond training: python -m benchmarks.round_overhead."""
