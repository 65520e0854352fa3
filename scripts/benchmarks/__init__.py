"""Benchmarks: one module per published measurement."""
