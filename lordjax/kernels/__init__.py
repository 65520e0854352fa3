"""Compressed weights as values: what may stand where a model expects a kernel."""
