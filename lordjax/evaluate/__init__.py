"""Measurements of a model; every number comes with the protocol it was taken under."""

from lordjax.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
