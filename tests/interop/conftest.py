"""Models of other libraries, which run in an environment of their own (extra ``interop``)."""

import functools
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from lordjax.scripts.benchmarks.functions import models

PACKAGES = {"equimo": "equimo", "tunix": "tunix"}  # first word of a case -> its package


@pytest.fixture(autouse=True)
def others_rules():
    """Other libraries rely on promotions that our own tests forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def pytest_collection_modifyitems(items):
    """Skips what needs packages that are not there, or their other versions."""
    flax = int(version("transformers").split(".")[0]) < 5
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # theirs are not ours to mend
        if not flax:
            reason = "transformers 5 has no Flax models; install the extra interop by itself"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def case():
    """Returns a model by its name; built once, or skipped without its package."""

    @functools.cache
    def build(name):
        package = PACKAGES.get(name.split()[0], "transformers")
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; it is in the extra interop")
        return models.build(name)

    return build
