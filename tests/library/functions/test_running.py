"""`compressed`: the same function with kernels in place of its parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from plain import MODELS, loss, scanned, unrolled

from lordjax import LowRank, compressed, encode, factorize, find_sites, materialize, nbytes
from lordjax.functions.fitting.linear import as_leaf
from lordjax.kernels import trees


def factored(model, rank=None):
    """A tree with a pair for every site, by the SVD of its matrices."""
    table = find_sites(model.apply, model.params, model.batches[0])

    def replace(path, leaf):
        if path not in table.names():
            return leaf
        matrices = table[path].layout.to_matrix(leaf)
        u, s, v = jnp.linalg.svd(matrices, full_matrices=False)
        pair = LowRank((u * s[..., None, :])[..., :rank], v[..., :rank, :])
        return as_leaf(table[path], pair, leaf)

    return trees.map_with_path(replace, model.params)


def close(found, wanted, tolerance=1e-5):
    wanted = np.asarray(wanted, np.float32)
    scale = max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, atol=tolerance * scale)


@pytest.mark.quick("scanned")
@pytest.mark.parametrize("name", MODELS)
def test_full_rank_is_the_original(name):
    model = MODELS[name]()
    fast, ids = compressed(model.apply), model.batches[0]
    wanted = model.apply(model.params, ids)
    tolerance = 2e-2 if name == "mixed" else 1e-5  # bfloat16
    found = fast(factored(model), ids)
    assert found.dtype == wanted.dtype
    close(found, wanted, tolerance)


@pytest.mark.quick("mixed")
@pytest.mark.parametrize("name", MODELS)
def test_dense_trees_run_as_they_are(name):
    model = MODELS[name]()
    wanted = jax.jit(model.apply)(model.params, model.batches[0])
    found = compressed(model.apply)(model.params, model.batches[0])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.quick("scanned")
@pytest.mark.parametrize("name", ["unrolled", "scanned", "rematerialized", "transposed", "experts"])
def test_gradients_are_those_of_the_matrices(name):
    model = MODELS[name]()
    small, ids, fast = factored(model, 4), model.batches[0], compressed(model.apply)

    def total(run, tree):
        return loss(run(tree, ids), ids).sum()

    value, found = jax.jit(jax.value_and_grad(functools.partial(total, fast)))(small)
    reference = lambda tree: total(model.apply, materialize(tree))  # noqa: E731
    wanted_value, wanted = jax.jit(jax.value_and_grad(reference))(small)
    close(value, wanted_value)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(a, b, 1e-4)


@pytest.mark.full
def test_factors_are_used_and_not_multiplied_out():
    model = scanned()
    small = factored(model, 2)
    text = str(jax.make_jaxpr(compressed(model.apply))(small, model.batches[0]))
    assert "16,24" not in text.replace(" ", "")  # the shape of gate and up


@pytest.mark.full
def test_transforms():
    model = unrolled()
    small, fast = factored(model, 4), compressed(model.apply)
    wanted = fast(small, model.batches[0])
    rows = jax.vmap(lambda ids: fast(small, ids[None])[0])(model.batches[0])
    close(rows, wanted)
    _, scan = jax.lax.scan(lambda c, ids: (c, fast(small, ids)), 0, jnp.stack(model.batches))
    close(scan[0], wanted)
    close(jax.checkpoint(fast)(small, model.batches[0]), wanted)
    pmapped = jax.pmap(fast, in_axes=(None, 0))(small, model.batches[0][None])
    close(pmapped[0], wanted)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), small)
    close(jax.vmap(fast, in_axes=(0, None))(stack, model.batches[0])[1], wanted)


@pytest.mark.full
def test_a_block_in_a_scan_of_the_user():
    model = scanned()
    blocks = model.params["blocks"]
    x = jnp.ones((2, 6, 16))

    def run(step, params):
        return jax.lax.scan(lambda x, p: (step(p, x), None), x, params)[0]

    from plain import block

    small = factored(model)["blocks"]
    close(run(compressed(block), small), run(block, blocks))


@pytest.mark.quick("factorize")
@pytest.mark.parametrize("make", [factorize, encode], ids=["factorize", "encode"])
def test_trees_of_data_free_functions(make):
    model = unrolled()
    options = {"rank": 3} if make is factorize else {"form": "nf4"}
    small = make(model.params, where="gate|up|down|head", **options)
    wanted = model.apply(materialize(small), model.batches[0])
    close(compressed(model.apply)(small, model.batches[0]), wanted, 1e-4)
    assert nbytes(small) < nbytes(model.params)


def test_a_pair_that_a_program_transposes():
    small = factorize({"w": jax.random.normal(jax.random.key(0), (12, 16))}, rank=3, where="w")
    x = jax.random.normal(jax.random.key(1), (5, 16))
    apply = lambda p, x: x @ p["w"].T  # noqa: E731
    close(compressed(apply)(small, x), apply(materialize(small), x))
    assert "12,16" not in str(jax.make_jaxpr(compressed(apply))(small, x)).replace(" ", "")


def test_a_kernel_outside_products_is_multiplied_out():
    small = factorize({"w": jax.random.normal(jax.random.key(0), (12, 16))}, rank=3, where="w")
    apply = lambda p, x: x @ p["w"] + p["w"].sum() + p["w"][:1]  # noqa: E731
    x = jax.random.normal(jax.random.key(1), (5, 12))
    close(compressed(apply)(small, x), apply(materialize(small), x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight + self.bias[None]


def test_dataclasses_and_tuples():
    layers = (Layer(jnp.eye(4, 6), jnp.ones(6)), Layer(jnp.eye(6, 4), jnp.zeros(4)))

    def apply(model, x):
        hidden = model[0](x)
        return {"out": model[1](jax.nn.relu(hidden)), "hidden": (hidden, None)}

    x = jnp.arange(8.0).reshape(2, 4)
    table = find_sites(apply, layers, x)
    assert table.names() == ["0/weight", "1/weight"]
    small = factorize(layers, rank=2, where="weight")
    found, wanted = compressed(apply)(small, x), apply(materialize(small), x)
    close(found["out"], wanted["out"])
    close(found["hidden"][0], wanted["hidden"][0])
    assert found["hidden"][1] is None


def test_nnx_state():
    model = nnx.Sequential(
        nnx.Linear(8, 12, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(12, 8, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(model)
    apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (3, 8))
    table = find_sites(apply, state, x)
    assert table.names() == ["layers/0/kernel", "layers/2/kernel"]
    small = factorize(state, rank=3, where="kernel")
    close(compressed(apply)(small, x), apply(materialize(small), x))


def test_random_keys_and_constants():
    def apply(params, x, key, *, rate, train):
        kept = jax.random.bernoulli(key, 1 - rate, x.shape) if train else True
        return jnp.where(kept, x, 0) @ params["w"]

    params = {"w": jax.random.normal(jax.random.key(0), (12, 16))}
    small, key = factorize(params, rank=4, where="w"), jax.random.key(1)
    x = jax.random.normal(key, (5, 12))
    options = {"rate": 0.5, "train": True}
    wanted = apply(materialize(small), x, key, **options)
    close(compressed(apply)(small, x, key, **options), wanted)


def test_a_broken_kernel_names_its_path():
    small = {"a": {"w": LowRank(jnp.ones((4, 2)), jnp.ones((3, 5)))}}
    with pytest.raises(ValueError, match=r"a/w: left .* do not match"):
        compressed(lambda p, x: x @ p["a"]["w"])(small, jnp.ones((2, 4)))


def test_float16_parameters_in_wide_products():
    params = {"w": jax.random.normal(jax.random.key(0), (12, 16), jnp.bfloat16)}
    apply = lambda p, x: x @ p["w"].astype(jnp.float32)  # noqa: E731
    x = jax.random.normal(jax.random.key(1), (5, 12))
    small = factorize(params, rank=4, where="w")
    found = compressed(apply)(small, x)
    assert found.dtype == jnp.float32
    pair = small["w"]
    close(found, x @ pair.left.astype(jnp.float32) @ pair.right.astype(jnp.float32), 1e-4)


def test_a_tree_of_another_structure_is_named():
    model = unrolled()
    fast = compressed(model.apply)
    fast(model.params, model.batches[0])
    other = {"embed": model.params["embed"], "blocks": model.params["blocks"], "top": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"KeyError: 'head'.*missing head, new top"):
        fast(other, model.batches[0])
    with pytest.raises(KeyError, match="head"):  # nothing is known of the first call's tree
        compressed(model.apply)(other, model.batches[0])
