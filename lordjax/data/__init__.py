"""Texts, token windows, training examples and their order."""
