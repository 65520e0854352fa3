"""Adapters on the parameters of any function, whatever their axes are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lordjax
from lordjax.kernels import trees
from lordjax.kernels.low_rank import LowRank


def apply(params, x):
    """Products with a matrix, with heads, with ``[out, in]``, and with scanned layers."""
    x = jnp.tanh(x @ params["plain"])
    x = jnp.einsum("nm,mhd->nhd", x, params["heads"]).reshape(len(x), -1)
    x = jnp.tanh(x @ params["turned"].T)
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
    return x * params["scale"][None]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def params():
    shapes = {"plain": (6, 8), "heads": (8, 3, 4), "turned": (8, 12), "stack": (3, 8, 8)}
    return {name: normal(i, *s) / 3 for i, (name, s) in enumerate(shapes.items())} | {
        "scale": jnp.ones(8)
    }


@pytest.fixture(scope="module")
def x():
    return normal(9, 5, 6)


@pytest.fixture(scope="module")
def sites(params, x):
    return lordjax.find_sites(apply, params, x)


def adapted(params, sites, **options):
    return lordjax.add_adapters(params, rank=2, key=jax.random.key(3), sites=sites, **options)


def trained(tree):
    """A tree with random numbers in place of the zeros of every adapter."""
    return jax.tree.map(
        lambda leaf: (
            LowRank(leaf.left, 0.1 * jax.random.normal(jax.random.key(4), leaf.right.shape))
            if isinstance(leaf, LowRank)
            else leaf
        ),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, LowRank),
    )


def test_new_adapters_change_nothing_and_have_gradients(params, sites, x):
    new, fast = adapted(params, sites), lordjax.compressed(apply)
    chosen = [path for path in trees.arrays(new) if "/low_rank/" in path]
    assert len(chosen) == 2 * 4
    part, rest = trees.partition(new, chosen)
    np.testing.assert_allclose(fast(new, x), apply(params, x), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda p: jnp.sum(fast(trees.combine(p, rest), x) ** 2))(part)
    norms = {
        path: float(jnp.abs(g).max()) for path, g in trees.arrays(grads).items() if g is not None
    }
    assert all(norm > 0 for path, norm in norms.items() if path.endswith("right"))


def test_merged_adapters_are_parameters_again(params, sites, x):
    new = trained(adapted(params, sites))
    merged = lordjax.merge(new)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    fast = lordjax.compressed(apply)
    assert float(jnp.abs(fast(new, x) - apply(params, x)).max()) > 1e-2
    np.testing.assert_allclose(apply(merged, x), fast(new, x), rtol=1e-4, atol=1e-5)


@pytest.mark.quick("svd")
@pytest.mark.parametrize("method", ["svd", "nf"])
def test_adapters_over_compressed_parameters(params, sites, x, method):
    budget = {"keep": 0.6} if method == "svd" else {"bits": 5}
    small, _ = lordjax.compress_params(params, sites, method=method, **budget)
    fast, new = lordjax.compressed(apply), adapted(small, sites)
    np.testing.assert_allclose(fast(new, x), fast(small, x), rtol=1e-4, atol=1e-5)
    changed = trained(new)
    assert float(jnp.abs(fast(changed, x) - fast(small, x)).max()) > 1e-3
    merged = lordjax.merge(changed)
    np.testing.assert_allclose(fast(merged, x), fast(changed, x), rtol=1e-3, atol=1e-4)


def test_where_chooses_and_dtypes_stay(params, sites, x):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    new = adapted(half, sites, where="plain|heads")
    assert {p for p, leaf in new.items() if isinstance(leaf, lordjax.Kernel)} == {"plain", "heads"}
    y = lordjax.compressed(apply)(new, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, apply(half, x.astype(jnp.bfloat16)), rtol=0.05, atol=0.05)


def test_errors_name_the_parameter(params, sites):
    with pytest.raises(ValueError, match=r"plain .*rank 7.*1 to 6"):
        lordjax.add_adapters(params, rank=7, key=jax.random.key(0), sites=sites, where="plain")
    with pytest.raises(ValueError, match=r"turned .*expected \[8, 12\]"):
        adapted(params | {"turned": params["turned"][:, :9]}, sites)
    with pytest.raises(KeyError, match="no parameter matches 'nothing'"):
        adapted(params, sites, where="nothing")
