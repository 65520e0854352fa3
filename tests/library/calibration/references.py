"""Reference statistics, computed by NumPy in float64."""

import jax
import numpy as np

from lordjax.calibration.statistics import AbsMean, Moments, SecondMoment

ROWS, WIDTH = 60, 7


def data(seed=0, rows=ROWS, width=WIDTH):
    """Correlated features with different means."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def reference(x, weights=None):
    """Moments, computed in two passes."""
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    mean = w @ x / w.sum()
    return Moments(w.sum(), mean, (w[:, None] * (x - mean)).T @ (x - mean))


def abs_reference(x, weights=None):
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    return AbsMean(w.sum(), w @ np.abs(x))


def second_reference(x, weights=None):
    x = np.asarray(x, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    return SecondMoment(w.sum(), (w[:, None] * x).T @ x)


REFERENCES = {
    "moments": reference,
    "abs_mean": abs_reference,
    "second_moment": second_reference,
}


def assert_close(actual, expected, tolerance):
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
        assert have.shape == want.shape
        assert np.linalg.norm(have - want) <= tolerance * max(np.linalg.norm(want), 1e-30)


def products(jaxpr):
    """Yields all matrix products of a jaxpr, also those inside its calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)
