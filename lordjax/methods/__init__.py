"""Methods by name. A new method is a row here, a theorem test and a number from a script."""

from lordjax.methods.base import Factors, Method, break_even, truncate
from lordjax.methods.svd import SVD_METHODS

METHODS: dict[str, Method] = {**SVD_METHODS}


def method_at(name: str, layer: str) -> str:
    """The method that ``name`` uses for a layer (``attention/v``): itself, or an exception."""
    return METHODS[name].exceptions.get(layer, name)


__all__ = ["METHODS", "Factors", "Method", "break_even", "method_at", "truncate"]
