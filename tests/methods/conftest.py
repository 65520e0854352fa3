"""Fixtures of several files about methods."""

import jax
import pytest


@pytest.fixture
def double():
    """Theorems are checked in double precision."""
    with jax.enable_x64(True):
        yield
