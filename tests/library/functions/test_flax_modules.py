"""Layers of Flax Linen, as other people's models use them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from plain import Model
from test_running import close, factored

from lordjax import collect, compress_params, compressed, factorize, find_sites, materialize

WIDTH, TOKENS = 16, 5


class Encoder(nn.Module):
    """Attention and a plain MLP with dropout, as a vision transformer has them."""

    @nn.compact
    def __call__(self, x, train=False):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))
        h = nn.Dropout(0.5, deterministic=not train)(h)
        return x + nn.Dense(WIDTH)(h)


class Scanned(nn.Module):
    """The encoder three times, with stacked parameters and rematerialization."""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Encoder, prevent_cse=False)
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(block(name="block"), x, None)[0]


class Recurrent(nn.Module):
    """A cell whose matrices every step uses, and a normalization with a state."""

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.GRUCell(WIDTH))(x)
        return nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))


class Tied(nn.Module):
    """Embeddings that are the output head as well."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(29, WIDTH)
        return embed.attend(nn.Dense(WIDTH)(embed(ids)))


def model(name):
    module = {c.__name__: c for c in (Encoder, Scanned, Recurrent, Tied)}[name]()
    shape = (2, TOKENS) if name == "Tied" else (2, TOKENS, WIDTH)
    make = jax.random.normal if name != "Tied" else lambda k, s: jax.random.randint(k, s, 0, 29)
    batches = [make(jax.random.key(i), shape) for i in range(2)]
    return Model(module.apply, module.init(jax.random.key(9), batches[0]), batches)


@pytest.mark.quick("Encoder")
@pytest.mark.parametrize("name", ["Encoder", "Scanned", "Recurrent", "Tied"])
def test_layers_are_sites_and_exact_at_full_rank(name):
    own = model(name)
    table = find_sites(own.apply, own.params, own.batches[0])
    kernels = [path for path in table if path.endswith("kernel")]
    assert set(table.names()) == set(kernels)
    close(
        compressed(own.apply)(factored(own), own.batches[0]), own.apply(own.params, own.batches[0])
    )
    assert len(table.modules) == (name in ("Encoder", "Scanned"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["Encoder", "Scanned"])
@pytest.mark.parametrize("method", ["modegpt", "lord-centred"])
def test_methods_on_linen_modules(name, method):
    own = model(name)
    loss = lambda out, x: jnp.sum(out**2, axis=-1)  # noqa: E731
    stats = collect(own.apply, own.params, own.batches, loss=loss)
    small, plan = compress_params(own.params, stats, method=method, keep=0.8)
    assert any(plan.ranks.values())
    found = jax.jit(compressed(own.apply))(small, own.batches[0])
    close(found, own.apply(materialize(small), own.batches[0]), 1e-4)


@pytest.mark.full
def test_dropout_makes_it_no_module():
    own = model("Encoder")
    key = {"dropout": jax.random.key(0)}
    table = find_sites(own.apply, own.params, own.batches[0], train=True, rngs=key)
    assert table.modules == () and "select_n" in str(table.refused)


@pytest.mark.full
def test_factors_are_trained_with_optax():
    own = model("Encoder")
    small = factorize(own.params, rank=2, where="Dense_./kernel")
    fast = compressed(own.apply)

    def chosen(tree, wanted=True):
        is_left = lambda keys, _: (getattr(keys[-1], "name", "") == "left") == wanted  # noqa: E731
        return jax.tree_util.tree_map_with_path(is_left, tree)

    others = functools.partial(chosen, wanted=False)
    adam, frozen = optax.masked(optax.adam(3e-2), chosen), optax.masked(optax.set_to_zero(), others)
    optimizer = optax.chain(adam, frozen)
    state, params = optimizer.init(small), small
    # A target that other left factors reach.
    other = jax.tree.map(lambda a, left: 1.5 * a if left else a, small, chosen(small))
    target = fast(other, own.batches[0])

    @jax.jit
    def step(params, state):
        error = lambda p: jnp.mean((fast(p, own.batches[0]) - target) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(error)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(60):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
    before, after = (tree["params"]["Dense_0"]["kernel"] for tree in (small, params))
    np.testing.assert_array_equal(before.right, after.right)
    assert not np.allclose(before.left, after.left)
