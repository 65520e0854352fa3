"""Benchmarks of a GPU: one run that measures everything in a time limit, and products alone."""
