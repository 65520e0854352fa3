"""Reads texts and instructions; makes token windows and training examples."""
