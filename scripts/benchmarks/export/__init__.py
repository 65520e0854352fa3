"""Benchmarks of exported models: what opens them, what they compute there, and how fast."""
