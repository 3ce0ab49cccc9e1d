"""From a module to the trace of its training step, a pure function of the state."""
