"""Benchmarks of compressing functions that are not ours: one program per claim."""
