"""Text generation: prefill, a jitted decode loop, sampling, stop strings."""
