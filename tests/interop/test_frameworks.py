"""Methods, budgets and files on models and trees of other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lordjax
from lordjax.scripts.benchmarks.functions import checks


@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm", "lord", "lord-linear", "nf", "auto"])
def test_methods_beside_the_data(case, method):
    """Fewer bytes change the outputs, and the tree keeps its structure and shapes."""
    model = case("FlaxLlama")
    stats = checks.statistics(model)
    budget = {"bits": 6} if method in lordjax.QUANTIZERS else {"keep": 0.6}
    small, _ = lordjax.compress_params(model.params, stats, method=method, **budget)
    new = lordjax.compressed(model.apply)(small, *model.batch)
    assert 0 < checks.difference(new, model.apply(model.params, *model.batch)) < 1.5
    shapes = jax.tree.map(jnp.shape, lordjax.materialize(small))
    assert shapes == jax.tree.map(jnp.shape, model.params)


@pytest.mark.parametrize("name", ["FlaxGPT2", "equimo ViT (Equinox)", "tunix Llama 3 (NNX)"])
def test_trees_of_all_frameworks_are_saved(case, name, tmp_path):
    model = case(name)
    sites = lordjax.find_sites(model.apply, model.params, *model.batch)
    small, plan = lordjax.compress_params(model.params, sites, method="svd", keep=0.5)
    lordjax.save_params(tmp_path / "small", small, plan=plan)
    loaded = lordjax.load_params(tmp_path / "small", like=model.params)
    assert jax.tree.structure(loaded) == jax.tree.structure(small)
    for new, old in zip(jax.tree.leaves(loaded), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(new, old)
