"""Equations of a function, run with parameters as views; see `lordjax.functions`."""
