"""Benchmarks: one module per measured claim."""
