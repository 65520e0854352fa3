"""Compressed weights: objects that replace the weight matrix of a linear layer."""
