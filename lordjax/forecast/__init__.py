"""Predicted cost of a compression, from shapes alone: operations, seconds, memory and bytes."""
