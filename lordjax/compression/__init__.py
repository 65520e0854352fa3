"""Compression of a whole model: prepare once, then compress to any budget."""
