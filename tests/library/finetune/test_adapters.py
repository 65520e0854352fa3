"""Adapters and recipes: which arrays are trained in every kind of kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tuning import BLOCKS, CONFIG, KINDS, examples, made, quantized

from lordjax.finetune import adapters, recipes, step
from lordjax.finetune.recipes import RECIPES
from lordjax.kernels import trees
from lordjax.kernels.base import materialize, matmul, nbytes
from lordjax.kernels.convert import factorize
from lordjax.kernels.kinds import weights
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.normal_float import Format
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.kernels.table import quantized_table, smaller_table
from lordjax.models import Transformer, init


@pytest.mark.quick("pairs", "matrices")
@pytest.mark.parametrize("kind", KINDS)
def test_split_and_join(params, kind):
    new, paths = made(params, kind)
    first, second = trees.partition(new, set(paths))
    assert len(jax.tree.leaves(first)) == len(paths)
    assert len(jax.tree.leaves(second)) == len(jax.tree.leaves(new)) - len(paths)
    again = trees.combine(first, second)
    assert jax.tree.structure(again) == jax.tree.structure(new)
    jax.tree.map(np.testing.assert_array_equal, again, new)


def test_split_names_what_is_not_there(params):
    with pytest.raises(KeyError, match=r"layer_0/attention/q/kernel/left.*did you mean"):
        trees.partition(params, {"layer_0/attention/q/kernel/left"})


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(params, kind):
    """Compares gradients with finite differences in double precision."""
    new, paths = made(params, kind)
    trained, frozen = trees.partition(new, set(paths))
    batch = examples(2)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), trained)
        rest = jax.tree.map(lambda a: a, frozen)

        def loss(trained):
            whole = trees.combine(trained, rest)
            # Activations have the dtype of the embedding.
            whole = {**whole, "embed": jax.tree.map(lambda a: a.astype("float64"), whole["embed"])}
            nll, _ = step.target_losses(CONFIG, whole, batch)
            return jnp.sum(nll)

        gradient = jax.grad(loss)(wide)
        # Half of it uphill, so that the slope stands out from the rounding of the logits.
        rng, norm = np.random.default_rng(3), optax.tree.norm(gradient)
        noise = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), wide)
        size = optax.tree.norm(noise)
        noise = jax.tree.map(lambda a: a * (float(norm) / float(size)), noise)
        way = jax.tree.map(jnp.add, gradient, noise)
        inner = sum(
            jnp.vdot(g, w) for g, w in zip(*map(jax.tree.leaves, (gradient, way)), strict=True)
        )
        size = 1e-3 / float(norm)

        def moved(size):
            return loss(jax.tree.map(lambda a, w: a + size * w, wide, way))

        there, back = moved(size), moved(-size)
        measured = (there - back) / (2 * size)
    # The logits of a chunk are float32.
    np.testing.assert_allclose(inner, measured, rtol=2e-2)


@pytest.mark.full
def test_new_adapters_change_nothing(params):
    for make in (lambda p: p, quantized, lambda p: factorize(p, keep=0.6, where=BLOCKS)):
        before = make(params)
        after = adapters.add_adapters(before, rank=4, key=jax.random.key(0))
        tokens = examples().tokens
        a, b = (Transformer(CONFIG).apply({"params": p}, tokens) for p in (before, after))
        np.testing.assert_array_equal(a, b)
        found = trees.flatten(after)
        assert all(isinstance(found[p], LowRankPlusQuantized) for p in trees.select(found, BLOCKS))


def test_adapters_that_do_not_fit(params):
    message = r"attention/k/kernel \[32, 16\]: adapter rank 17; expected 1 to 16"
    with pytest.raises(ValueError, match=message):
        adapters.add_adapters(params, rank=17, key=jax.random.key(0))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["over matrices", "over pairs", "over codes"])
def test_merging_is_the_same_model(params, kind):
    new, _ = made(params, kind)
    merged = adapters.merge(new)
    tokens = examples().tokens
    a, b = (Transformer(CONFIG).apply({"params": p}, tokens) for p in (new, merged))
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    kinds = {type(leaf) for p, leaf in trees.flatten(merged).items() if p.endswith("kernel")}
    if kind == "over codes":
        assert kinds == {LowRankPlusQuantized}
    else:
        assert LowRankPlusQuantized not in kinds
    for path, leaf in trees.flatten(merged).items():
        if isinstance(leaf, LowRank):
            assert weights(leaf) < np.prod(leaf.shape), path


@pytest.mark.parametrize("form", ["nf4", "float16"])
def test_tables_in_smaller_formats_are_not_changed(params, form):
    """Adapters come and go in the blocks; the embedding stays as it is stored."""
    table = jnp.asarray(params["embed"]["embedding"])
    small = smaller_table(table, "float16")
    if form == "nf4":
        small = quantized_table(NFQuantized.encode(table.T, Format.parse(form)), "float32")
    tree = trees.update(params, {"embed/embedding": small})
    lora = dataclasses.replace(RECIPES["lora"], rank=4)
    tuned, paths = recipes.initial_params(lora, tree, jax.random.key(0))
    assert not [path for path in paths if path.startswith("embed")]
    merged = adapters.merge(tuned)["embed"]["embedding"]
    assert nbytes(merged) == nbytes(small) < nbytes(table)
    np.testing.assert_array_equal(materialize(merged), materialize(small))


def test_codes_under_every_block_matrix(params):
    mixed = factorize(params, keep=0.6, where="mlp/.*kernel$")
    new = adapters.quantize_bases(mixed, "nf4")
    assert nbytes(
        {p: a for p, a in trees.flatten(new).items() if p.endswith("kernel")}
    ) < 0.2 * sum(4 * weights(a) for p, a in trees.flatten(mixed).items() if p.endswith("kernel"))
    again = adapters.quantize_bases(new, "nf4")
    jax.tree.map(np.testing.assert_array_equal, again, new)
    assert adapters.trainable(new, (".",)) == [
        p for p in trees.arrays(new) if not p.endswith(("codes", "scales", "supers", "offset"))
    ]


def test_recipes_on_a_model_without_what_they_train(params):
    with pytest.raises(
        KeyError, match=r"trains kernel/low_rank/.*but no parameter of the model matches"
    ):
        recipes.initial_params(RECIPES["lq-lora"], params, jax.random.key(0))


@pytest.mark.full
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"hidden_size": 4096, "mlp_size": 11008, "num_layers": 32, "num_heads": 32}, 159_907_840),
        (
            {"hidden_size": 8192, "mlp_size": 28672, "num_layers": 80, "num_heads": 64}
            | {"num_kv_heads": 8},
            828_375_040,
        ),
    ],
)
def test_trainable_counts_of_llama_2(size, expected):
    """Counts trainable parameters at rank 64, as in the paper (arXiv 2311.12023)."""
    kv = {"num_kv_heads": size.get("num_kv_heads", 32)}
    config = dataclasses.replace(CONFIG, **{**size, **kv}, head_size=128, vocab_size=32000)

    def shapes():
        return adapters.add_adapters(
            init(config, jax.random.key(0)), rank=64, key=jax.random.key(0)
        )

    arrays = trees.arrays(jax.eval_shape(shapes))
    assert sum(a.size for p, a in arrays.items() if "/low_rank/" in p) == expected


@pytest.mark.full
def test_a_trained_product_is_what_is_multiplied(params):
    new, _ = made(params, "over codes")
    leaf = new["layer_0"]["mlp"]["up"]["kernel"]
    x = jax.random.normal(jax.random.key(0), (5, 32))
    np.testing.assert_allclose(matmul(x, leaf), x @ materialize(leaf), rtol=1e-4, atol=1e-4)
