"""Reads a config.json: which keys count, their values, the head, old names."""
