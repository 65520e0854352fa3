"""Fixtures for the tests of methods."""

import jax
import pytest


@pytest.fixture
def double():
    """Enables float64, in which theorems are checked."""
    with jax.enable_x64(True):
        yield
