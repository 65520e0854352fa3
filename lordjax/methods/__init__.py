"""Methods by name. A new method is a row here, a theorem test and a number from a script."""

from lordjax.methods.base import Factors, Method, break_even, truncate
from lordjax.methods.svd import SVD_METHODS

METHODS: dict[str, Method] = {**SVD_METHODS}

__all__ = ["METHODS", "Factors", "Method", "break_even", "truncate"]
