"""Fixtures for the fine-tuning tests."""

import jax
import pytest
from tuning import CONFIG

from lordjax.models import init


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))
