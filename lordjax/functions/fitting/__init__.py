"""Factors and codes of a function's sites, and the leaves that a plan makes of them."""
