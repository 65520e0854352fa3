"""`find_sites`: which matrices a function has, from shapes alone."""

import jax
import jax.numpy as jnp
import pytest
from plain import HEAD, HEADS, HIDDEN, LAYERS, MODELS, VOCAB, WIDTH, tokens

from lordjax import find_sites


def sites(name):
    model = MODELS[name]()
    return find_sites(model.apply, model.params, model.batches[0])


def test_matrices_of_every_layout():
    found = sites("unrolled")
    row = found["blocks/0/q"]
    assert (row.fan_in, row.fan_out, row.stack) == (WIDTH, HEADS * HEAD, ())
    row = found["blocks/1/o"]
    assert (row.fan_in, row.fan_out) == (HEADS * HEAD, WIDTH)
    assert row.operations == 2 * 12 * WIDTH * WIDTH  # of 2 x 6 tokens
    assert set(found.names()) == set(found) - {"embed"}
    assert "gather" in found["embed"].reason
    row = sites("transposed")["blocks/0/fc1/kernel"]
    assert (row.fan_in, row.fan_out, row.shape) == (WIDTH, HIDDEN, (HIDDEN, WIDTH))


@pytest.mark.parametrize("name", ["scanned", "rematerialized"])
def test_scanned_leaves_are_stacks(name):
    row = sites(name)["blocks/gate"]
    assert row.stack == (LAYERS,) and (row.fan_in, row.fan_out) == (WIDTH, HIDDEN)
    assert row.operations == LAYERS * 2 * 12 * WIDTH * HIDDEN


def test_leaves_that_are_indexed_are_stacks_if_every_matrix_is_used():
    row = sites("indexed")["blocks/gate"]
    assert row.stack == (LAYERS,) and row.reason is None and row.uses == ("product",) * LAYERS
    found = find_sites(lambda p, x: x @ p["w"][1], {"w": jnp.ones((3, 4, 5))}, jnp.ones((2, 4)))
    assert found["w"].reason == "only some of its slices are in products"


def test_experts_are_stacks_and_their_axes_may_come_first():
    row = sites("dispatched")["down"]
    assert row.stack == (2,) and (row.fan_in, row.fan_out) == (HIDDEN, WIDTH)
    row = sites("experts")["up"]  # one product gives the outputs of all experts
    assert row.stack == () and (row.fan_in, row.fan_out) == (WIDTH, 4 * HIDDEN)


def test_a_matrix_with_other_uses_stays_dense():
    found = sites("transposed")
    assert "gather" in found["embed"].reason and found["embed"].fan_out == VOCAB
    assert "blocks/0/qkv/kernel" in found.names()


def test_loops_and_branches():
    found = sites("recurrent")
    assert found["cell"].stack == () and found["cell"].operations == 6 * 2 * 2 * WIDTH**2
    assert found["extra"].reason is None


def test_shapes_are_enough():
    model = MODELS["scanned"]()
    shapes = jax.eval_shape(lambda: model.params)
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)
    found = find_sites(model.apply, shapes, ids)
    assert found.rows == sites("scanned").rows
    text = str(found)
    assert "3 x 16 -> 24" in text and "no product uses it, but gather" in text


def test_what_cannot_be_done_says_why():
    params = {
        "conv": jnp.ones((3, 4, 5)),
        "twice": jnp.ones((6, 6)),
        "pair": jnp.ones((6, 6)),
        "sliced": jnp.ones((6, 8)),
        "unused": jnp.ones((2, 2)),
        "scaled": jnp.ones((6, 6)),
        "vector": jnp.ones((6, 1)),
        "codes": jnp.ones((6, 6), jnp.int8),
    }

    def apply(p, x):
        y = x @ p["twice"] + x @ p["twice"].T + x @ (p["pair"] @ p["pair"])
        y = y + x @ p["sliced"][:, :6] + x @ (2 * p["scaled"]) + x @ p["vector"]
        z = jnp.ones((1, 8, 4))
        conv = jax.lax.conv_general_dilated(
            z, p["conv"], (1,), "SAME", None, None, ("NWC", "WIO", "NWC")
        )
        return y, conv

    found = find_sites(apply, params, jnp.ones((2, 6)))
    reasons = found.left_dense
    assert set(reasons) == set(params)
    assert reasons["conv"] == "no product uses it, but conv_general_dilated"
    assert "different matrices" in reasons["twice"]
    assert "product of two parameters" in reasons["pair"]
    assert reasons["codes"] == "int8, which is no floating-point dtype"
    assert "slice" in reasons["sliced"] and "mul" in reasons["scaled"]
    assert reasons["unused"] == "nothing uses it" and "one output" in reasons["vector"]


def test_unknown_paths_are_suggested():
    with pytest.raises(KeyError, match="did you mean blocks/0/gate"):
        _ = sites("unrolled")["blocks/0/gates"]


def test_leaves_of_one_path_are_refused():
    with pytest.raises(ValueError, match="two leaves at 'a/b'"):
        find_sites(lambda p, x: x, {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}, 1)


def test_constants_and_keyword_arguments():
    def apply(params, x, name, *, scale, train=False):
        assert name == "a" and not train
        return scale * (x @ params[name])

    found = find_sites(apply, {"a": jnp.ones((4, 5))}, jnp.ones((3, 4)), "a", scale=jnp.ones(()))
    assert found.names() == ["a"]


def test_custom_derivatives_and_jitted_functions_are_entered():
    @jax.custom_vjp
    def double(w, x):
        return 2 * jax.jit(jnp.matmul)(x, w)

    double.defvjp(lambda w, x: (double(w, x), None), lambda _, g: (None, None))
    found = find_sites(lambda p, x: double(p["w"], x), {"w": jnp.ones((4, 5))}, jnp.ones((3, 4)))
    assert found.names() == ["w"]


def test_tokens_are_no_stack():
    assert tokens(0).shape == (2, 6)
    assert sites("mixed")["up"].dtype == jnp.float32
