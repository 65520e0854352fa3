"""Allocation of ranks and formats to sites under one budget: error curves in, a plan out."""
