"""Measures models; every number is returned with the protocol that it was measured by."""

from lordjax.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
