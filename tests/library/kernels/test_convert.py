"""Factorization of parameter trees: nested dicts and NNX states, under JAX transformations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lordjax import LowRank, NFQuantized, encode, factorize, materialize, nbytes
from lordjax.kernels import trees

IN, OUT, RANK = 12, 20, 4  # break-even rank 7.5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    return {
        "layer_0": {"up": {"kernel": normal(0, IN, OUT), "bias": normal(1, OUT)}},
        "layer_1": {"down": {"kernel": normal(2, OUT, IN)}},
        "norm": {"scale": normal(3, IN)},
    }


def kernel_of(tree):
    return tree["layer_0"]["up"]["kernel"]


def tail(matrix, rank):
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return np.sqrt(np.sum(values[rank:] ** 2))


def distance(a, b):
    return np.linalg.norm(np.asarray(materialize(a), np.float64) - np.asarray(b, np.float64))


def assert_same_matrices(actual, expected, atol=1e-5):
    """Factors are unique up to signs only, their products are unique."""
    actual, expected = materialize(actual), materialize(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual, expected)


# --- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(IN, OUT), (OUT, IN), (16, 16)], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_is_the_tail_of_the_spectrum(shape, rank):
    # Eckart and Young: no matrix of this rank is nearer, and this distance is reached.
    matrix = normal(5, *shape)
    kernel = factorize({"kernel": matrix}, rank=rank)["kernel"]
    assert isinstance(kernel, LowRank) and kernel.rank == rank and kernel.shape == shape
    np.testing.assert_allclose(distance(kernel, matrix), tail(matrix, rank), rtol=1e-5)


def test_small_singular_values_are_not_lost():
    # Through the Gram matrix float32 would stop at 3e-4 of the largest singular value.
    left, right = (np.linalg.qr(np.random.default_rng(s).normal(size=(32, 32)))[0] for s in (0, 1))
    matrix = jnp.asarray((left * 10.0 ** (-np.arange(32) / 3)) @ right, jnp.float32)
    kernel = factorize({"kernel": matrix}, rank=12)["kernel"]
    assert distance(kernel, matrix) < 1.05 * tail(matrix, 12) < 2e-4


def test_a_matrix_of_low_rank_is_reproduced():
    matrix = normal(6, IN, 3) @ normal(7, 3, OUT)
    kernel = factorize({"kernel": matrix}, rank=3)["kernel"]
    np.testing.assert_allclose(materialize(kernel), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_factors_have_the_dtype_of_the_matrix(dtype):
    matrix = normal(8, IN, OUT).astype(dtype)
    kernel = factorize({"kernel": matrix}, rank=RANK)["kernel"]
    assert kernel.left.dtype == kernel.right.dtype == dtype
    # Computed in float32 and rounded once: within the rounding of the factors.
    rounding = 4 * float(jnp.finfo(dtype).eps) * np.linalg.norm(np.asarray(matrix, np.float64))
    assert distance(kernel.left.astype(jnp.float32) @ kernel.right.astype(jnp.float32), matrix) < (
        tail(matrix.astype(jnp.float32), RANK) + rounding
    )


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.77, 0.99])
def test_keep_is_a_share_of_the_weights(keep):
    tree = params()
    new = factorize(tree, keep=keep)
    for path, kernel in trees.flatten(new).items():
        dense = trees.flatten(tree)[path]
        if path.endswith("kernel"):
            fan_in, fan_out = dense.shape
            assert nbytes(kernel) <= keep * nbytes(dense)
            # One rank more would be too much.
            assert (kernel.rank + 1) * (fan_in + fan_out) > keep * fan_in * fan_out
        else:
            assert kernel is dense


def test_keeping_everything_changes_nothing():
    tree = params()
    new = factorize(tree, keep=1.0)
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(tree), strict=True))


def test_ranks_that_save_nothing_leave_the_matrix_dense():
    tree = {"wide": {"kernel": normal(9, 8, 24)}, "square": {"kernel": normal(10, 12, 12)}}
    new = factorize(tree, rank=6)  # break-even ranks: 6 and 6
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(tree), strict=True))
    assert isinstance(factorize(tree, rank=5)["wide"]["kernel"], LowRank)


def test_where_chooses_and_the_input_is_untouched():
    tree = params()
    before = jax.tree.map(np.array, tree)
    new = factorize(tree, rank=RANK, where="layer_0/.*kernel")
    assert isinstance(kernel_of(new), LowRank)
    assert new["layer_1"]["down"]["kernel"] is tree["layer_1"]["down"]["kernel"]
    assert not isinstance(kernel_of(tree), LowRank)
    jax.tree.map(np.testing.assert_array_equal, tree, before)
    # What is factored already stays as it is.
    again = factorize(new, rank=RANK)
    assert kernel_of(again) is kernel_of(new)
    assert isinstance(again["layer_1"]["down"]["kernel"], LowRank)


def test_materialize_and_nbytes():
    tree = params()
    new = factorize(tree, rank=RANK)
    assert nbytes(tree) == 4 * (2 * IN * OUT + OUT + IN)
    assert nbytes(new) == 4 * (2 * RANK * (IN + OUT) + OUT + IN)
    dense = materialize(new)
    assert jax.tree.structure(dense) == jax.tree.structure(tree)
    assert nbytes(dense) == nbytes(tree)
    np.testing.assert_allclose(
        kernel_of(dense), kernel_of(new).left @ kernel_of(new).right, atol=1e-5
    )


# --- transformations -----------------------------------------------------------------------------


def test_jit_equals_eager():
    tree = params()
    assert_same_matrices(jax.jit(lambda t: factorize(t, rank=RANK))(tree), factorize(tree, rank=4))
    assert_same_matrices(
        jax.jit(lambda t: materialize(factorize(t, keep=0.5)))(tree), factorize(tree, keep=0.5)
    )
    # Sizes are known before anything is computed.
    assert nbytes(jax.eval_shape(lambda t: factorize(t, rank=RANK), tree)) == nbytes(
        factorize(tree, rank=RANK)
    )


def test_stacks_and_vmap_equal_the_single_results():
    stack = {"kernel": normal(11, 3, IN, OUT)}
    stacked = factorize(stack, rank=RANK)
    mapped = jax.vmap(lambda t: factorize(t, rank=RANK))(stack)
    assert stacked["kernel"].shape == mapped["kernel"].shape == (3, IN, OUT)
    assert_same_matrices(stacked, mapped)
    for i in range(3):
        single = factorize({"kernel": stack["kernel"][i]}, rank=RANK)
        assert_same_matrices(jax.tree.map(lambda a, i=i: a[i], mapped), single)


# jax announces that pmap is a wrapper over shard_map; it must work as long as it exists.
@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap_over_devices():
    assert jax.local_device_count() == 4
    stack = {"up": {"kernel": normal(12, 4, IN, OUT), "bias": normal(13, 4, OUT)}}
    x = normal(14, 4, 5, IN)

    def compressed(tree, x):
        new = factorize(tree, rank=RANK)
        return new, x @ materialize(new)["up"]["kernel"]

    new, y = jax.pmap(compressed)(stack, x)
    assert len(new["up"]["kernel"].left.sharding.device_set) == 4
    assert_same_matrices(new, factorize(stack, rank=RANK))
    np.testing.assert_allclose(y, x @ materialize(new)["up"]["kernel"], atol=1e-4)
    assert nbytes(new) == 4 * 4 * (RANK * (IN + OUT) + OUT)


@pytest.mark.parametrize("spec", [(None, "d"), ("d", None), ("d", None, None)], ids=str)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_sharded_inputs(spec, jit):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    matrix = normal(15, *(4, IN, OUT)[-len(spec) :])
    tree = {"kernel": matrix}
    sharded = jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))
    assert not sharded["kernel"].is_fully_replicated

    def run(tree):
        return factorize(tree, rank=RANK)

    new = (jax.jit(run) if jit else run)(sharded)
    assert isinstance(new["kernel"], LowRank)
    assert_same_matrices(jax.device_get(new), factorize(tree, rank=RANK))


def test_gradients_flow_through_the_factors():
    new = factorize(params(), rank=RANK)

    def loss(tree):
        return jnp.sum(materialize(tree)["layer_0"]["up"]["kernel"] ** 2)

    gradient = kernel_of(jax.grad(loss)(new))
    matrix = materialize(kernel_of(new))
    np.testing.assert_allclose(gradient.left, 2 * matrix @ kernel_of(new).right.T, atol=1e-4)


# --- NNX -----------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(IN, OUT, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(OUT, OUT, rngs=rngs), nnx.Linear(OUT, IN, rngs=rngs)])

    def __call__(self, x):
        x = jnp.tanh(self.up(x))
        for layer in self.layers:
            x = layer(x)
        return x


def test_nnx_state_merges_back_and_runs():
    net, x = Net(nnx.Rngs(0)), normal(16, 3, IN)
    graph, state = nnx.split(net)
    new = factorize(state, rank=RANK)
    assert isinstance(new, nnx.State)
    table = trees.flatten(new)
    assert {p for p, leaf in table.items() if isinstance(leaf, LowRank)} == {
        "up/kernel",
        "layers/0/kernel",
        "layers/1/kernel",
    }
    biases = OUT + OUT + IN
    assert nbytes(new) == 4 * (RANK * (2 * (IN + OUT) + 2 * OUT) + biases)
    assert nbytes(state) == 4 * (2 * IN * OUT + OUT * OUT + biases)

    merged = nnx.merge(graph, materialize(new))
    y = jnp.tanh(x @ table["up/kernel"].materialize() + net.up.bias[...][None])
    for i, layer in enumerate(net.layers):
        y = y @ table[f"layers/{i}/kernel"].materialize() + layer.bias[...][None]
    np.testing.assert_allclose(merged(x), y, atol=1e-5)
    assert float(jnp.abs(merged(x) - net(x)).max()) > 1e-3  # it is another function
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), net(x))  # the input is untouched


def test_nnx_state_under_jit_equals_a_dict():
    graph, state = nnx.split(nnx.Linear(IN, OUT, rngs=nnx.Rngs(1)))
    new = jax.jit(lambda s: factorize(s, keep=0.5))(state)
    as_dict = factorize({"kernel": state["kernel"][...]}, keep=0.5)
    assert_same_matrices(trees.flatten(new)["kernel"], as_dict["kernel"])
    assert nnx.merge(graph, materialize(new))(normal(17, 2, IN)).shape == (2, OUT)


def test_a_linen_module_inside_nnx():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(OUT)(x)

    x = normal(18, 2, IN)
    net = nnx.bridge.ToNNX(Inner(), rngs=nnx.Rngs(0)).lazy_init(x)
    graph, state, rest = nnx.split(net, nnx.Param, ...)
    new = factorize(state, rank=RANK)
    kernel = trees.flatten(new)["Dense_0/kernel"]
    assert isinstance(kernel, LowRank)
    np.testing.assert_allclose(
        nnx.merge(graph, materialize(new), rest)(x), x @ kernel.materialize(), atol=1e-5
    )


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of rank and keep"),
        ({"rank": 2, "keep": 0.5}, "exactly one of rank and keep"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"keep": 0.0}, r"keep must be in \(0, 1\]"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\]"),
        ({"keep": float("nan")}, r"keep must be in \(0, 1\]"),
        (
            {"rank": 2, "where": "scale|bias"},
            r"layer_0/up/bias \(20,\) float32, norm/scale \(12,\)",
        ),
        ({"rank": 2, "where": "ids"}, r"ids \(4, 4\) int32"),
        ({"keep": 0.1}, r"rank 1 of layer_0/up/kernel \(12, 20\), layer_1/down/kernel"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorize(params() | {"ids": jnp.ones((4, 4), jnp.int32)}, **arguments)


def test_no_match_suggests_paths():
    with pytest.raises(KeyError, match=r"no parameter matches.*did you mean layer_0/up/kernel"):
        factorize(params(), rank=2, where="layer_0/up/kernl")


def test_leaves_that_would_share_a_path_are_refused():
    with pytest.raises(ValueError, match="two leaves at 'a/b'"):
        factorize({"a": {"b": normal(0, 4, 4)}, "a/b": normal(1, 4, 4)}, rank=1, where="b")


def test_encode_replaces_what_matches_in_one_pass():
    tree = {
        "a": {"kernel": jnp.linspace(-1, 1, 32 * 48).reshape(32, 48), "bias": jnp.ones(48)},
        "stack": {"kernel": jax.random.normal(jax.random.key(0), (2, 32, 48))},
    }
    new = encode(tree, "nf8")
    assert isinstance(new["a"]["kernel"], NFQuantized)
    assert new["stack"]["kernel"].shape == (2, 32, 48)
    assert new["a"]["bias"] is tree["a"]["bias"]
    back = materialize(new)
    for name in tree:
        # Half of the widest gap of NF8, relative to a block's largest magnitude.
        np.testing.assert_allclose(back[name]["kernel"], tree[name]["kernel"], atol=0.014 * 4)
    assert nbytes(new["a"]["kernel"]) < 0.3 * nbytes(tree["a"]["kernel"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("nf5",), ValueError, "bits"),
        (("int4",), ValueError, "is no format"),
        (("nf4", "kernal$"), KeyError, "no parameter matches"),
        (("nf4", "bias$"), ValueError, "not floating-point matrices"),
    ],
)
def test_encode_rejects_what_it_cannot_do(arguments, error, message):
    tree = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    form, *where = arguments
    with pytest.raises(error, match=message):
        encode(tree, form, **({"where": where[0]} if where else {}))
