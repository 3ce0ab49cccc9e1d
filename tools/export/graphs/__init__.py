"""The graph that a step is compiled to: built, counted, laid out in memory, rewritten."""
