"""Fine-tuning steps: trained and frozen arrays, and runs that depend only on their arguments."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tuning import BLOCKS, CONFIG, examples, losses, quantized, steps

from lordjax.data.examples import Data, Examples
from lordjax.finetune import adapters, recipes, step
from lordjax.finetune.recipes import RECIPES, Recipe
from lordjax.finetune.step import Settings
from lordjax.kernels import trees
from lordjax.kernels.convert import factorize
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.models import Transformer
from lordjax.runtime.mesh import make_mesh


def test_eight_examples_are_learned_by_heart(params):
    found = steps(params, dataclasses.replace(RECIPES["full"], learning_rate=1e-2), Settings(120))
    assert losses(found)[-1] < 0.05 < 1 < losses(found)[0]


@pytest.mark.full
def test_only_what_is_named_changes(params):
    base = quantized(params)

    def digest(tree):
        return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(tree)))

    before = digest(base).hexdigest()
    data = Data(examples(), examples(0), {})
    recipe = dataclasses.replace(RECIPES["qlora"], rank=4, learning_rate=1e-2)
    start, paths = recipes.initial_params(recipe, base, jax.random.key(0))
    trained, frozen = step.split_trainable(start, paths, "float32")
    optimizer = recipes.optimizer(recipe, 5)
    run = step.run(
        CONFIG, step.init_state(trained, optimizer), frozen, data.train, optimizer, Settings(5)
    )
    *_, (state, _) = run
    end = trees.arrays(step.with_trained(state.params, start, paths))
    for path, a in trees.arrays(start).items():
        assert np.array_equal(a, end[path]) == ("low_rank" not in path), path
    assert digest(base).hexdigest() == before


@pytest.mark.full
def test_accumulation_changes_nothing_but_memory(params):
    """The loss is a mean over targets, also if micro-batches have different numbers of them."""
    data = examples()
    few = data.targets.copy()
    few[:3, 4:] = -1
    data = data._replace(targets=few)
    whole, parts = (steps(params, RECIPES["full"], Settings(4, 8, n), data) for n in (1, 4))
    np.testing.assert_allclose(losses(whole), losses(parts), rtol=1e-5)
    assert [m["targets"] for _, m in whole] == [int((few >= 0).sum())] * 4


@pytest.mark.full
def test_the_loss_is_that_of_the_targets(params):
    data = examples(4)
    logits = np.asarray(Transformer(CONFIG).apply({"params": params}, data.tokens), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(
        logits, np.maximum(data.targets, 0)[..., None], -1
    ).squeeze(-1)
    wanted = data.targets >= 0
    wanted[:, ::2] = False
    (_, metrics), *_ = steps(
        params,
        RECIPES["full"],
        Settings(1, 4),
        data._replace(targets=np.where(wanted, data.targets, -1)),
    )
    np.testing.assert_allclose(metrics["nll"], nll[wanted].mean(), rtol=1e-5)


@pytest.mark.full
def test_padding_is_not_seen(params):
    short = examples(8, 10)
    wide = [
        np.pad(a, ((0, 0), (0, 6)), constant_values=v)
        for a, v in zip(short[:2], (5, -1), strict=True)
    ]
    padded = Examples(*wide, np.broadcast_to(np.arange(16) < 10, (8, 16)))
    a, b = (steps(params, RECIPES["full"], Settings(3), data) for data in (short, padded))
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("scale", [0.25, pytest.param(2.0, marks=pytest.mark.slow)])
def test_alpha_is_a_learning_rate(params, scale):
    """LoRA's ``x A B · alpha / r`` under Adam equals our adapters, which do not store the scale."""
    rank, rate, key = 4, 1e-3, jax.random.key(0)
    recipe = Recipe((recipes.ADAPTERS,), rank=rank, alpha=scale * rank, learning_rate=rate)
    recipe = dataclasses.replace(recipe, schedule="constant", warmup=0.0, clip=None)
    found = steps(params, recipe, Settings(6, accumulate=1))

    plain = adapters.add_adapters(params, rank=rank, key=jax.random.key(0))
    paths = adapters.trainable(plain, (recipes.ADAPTERS,))
    trained, frozen = trees.partition(plain, set(paths))
    optimizer = optax.adamw(rate, weight_decay=0.0)

    def loss(trained, part):
        def times(leaf):
            left = scale * leaf.low_rank.left
            return LowRankPlusQuantized(leaf.base, LowRank(left, leaf.low_rank.right))

        whole = trees.map_with_path(
            lambda _, leaf: times(leaf) if isinstance(leaf, LowRankPlusQuantized) else leaf,
            trees.combine(trained, frozen),
        )
        nll, _ = step.target_losses(CONFIG, whole, part)
        return jnp.sum(nll) / int((part.targets >= 0).sum())

    state, theirs = optimizer.init(trained), []
    for i in range(6):
        part = jax.tree.map(
            lambda a: a[0], step.microbatches(examples(), Settings(6, accumulate=1), i)
        )
        value, gradient = jax.value_and_grad(loss)(trained, part)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
        theirs.append(float(value))
    assert key is not None
    np.testing.assert_allclose(losses(found), theirs, rtol=2e-4)
    assert abs(theirs[-1] - theirs[0]) > 1e-2


@pytest.mark.full
def test_a_pupil_who_is_the_teacher_learns_nothing(params):
    settings = Settings(1, distill=1.0)
    (_, metrics), *_ = steps(params, RECIPES["full"], settings, teacher=params)
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["gradient"] < 1e-4 < metrics["nll"]


@pytest.mark.full
def test_distillation_comes_nearer_to_the_teacher(params):
    small = factorize(params, keep=0.4, where=BLOCKS)
    recipe = dataclasses.replace(RECIPES["factors"], learning_rate=3e-3)
    found = steps(small, recipe, Settings(40, distill=1.0), teacher=params)
    assert losses(found)[-1] < 0.5 * losses(found)[0]
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        steps(small, recipe, Settings(1, distill=0.5))


def test_classifiers_are_not_distilled():
    config = dataclasses.replace(CONFIG, head="classes", num_classes=2)
    run = step.run(config, None, None, None, None, Settings(1, distill=0.5), teacher={})
    with pytest.raises(ValueError, match="only models that predict tokens are distilled"):
        next(run)


@pytest.mark.full
def test_block_by_block_changes_no_gradient(params):
    def loss(params, **how):
        return jnp.sum(step.target_losses(CONFIG, params, examples(), **how)[1])

    trained = tuple(trees.arrays(params))
    plain = jax.grad(loss)(params)
    for remat in (False, True):
        found = jax.grad(functools.partial(loss, trained=trained, remat=remat))(params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, plain
        )


@pytest.mark.full
def test_one_and_four_devices(params):
    recipe = dataclasses.replace(RECIPES["qlora"], rank=4, learning_rate=1e-2)
    one, four = (
        steps(params, recipe, Settings(6), mesh=None if n == 1 else make_mesh({"data": n}))
        for n in (1, 4)
    )
    np.testing.assert_allclose(losses(one), losses(four), rtol=1e-4)
    with pytest.raises(ValueError, match="6 rows for 4 devices; expected a multiple"):
        steps(params, recipe, Settings(1, 6), mesh=make_mesh({"data": 4}))
    with pytest.raises(ValueError, match="9 devices asked for; there are"):
        make_mesh({"data": 9})


@pytest.mark.full
def test_bfloat16_trains_in_float32(params):
    found = steps(params, RECIPES["full"], Settings(8, dtype="bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(found[-1][0])} == {np.dtype(np.float32)}
    exact = steps(params, RECIPES["full"], Settings(8))
    np.testing.assert_allclose(losses(found), losses(exact), rtol=0.02)


@pytest.mark.parametrize(
    "settings", [Settings(0), Settings(1, 4, 3), Settings(1, distill=1.5), Settings(1, 0)]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match="expected"):
        settings.check()


def test_a_loss_that_is_not_finite_is_an_error(params):
    recipe = dataclasses.replace(RECIPES["full"], learning_rate=1e30, warmup=0.0, clip=None)
    with pytest.raises(ValueError, match=r"step \d: loss .* lower the learning rate"):
        steps(params, recipe, Settings(5))


def test_schedules_end_where_they_should():
    for name in recipes.SCHEDULES:
        recipe = Recipe((".",), schedule=name, learning_rate=1.0, warmup=0.2, clip=None)
        optimizer, one = recipes.optimizer(recipe, 10), {"kernel": jnp.ones(1)}
        state, sizes = optimizer.init(one), []
        for _ in range(10):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(one, state, one)
            sizes.append(-float(updates["kernel"][0]))
        assert sizes[0] == pytest.approx(0.5, rel=1e-3), name
        assert max(sizes) == pytest.approx(1.0, rel=1e-3), name
        assert (sizes[-1] == pytest.approx(1.0, rel=1e-3)) == (name == "constant"), name
    with pytest.raises(ValueError, match="schedule 'steps'; expected one of constant"):
        recipes.optimizer(Recipe((".",), schedule="steps"), 3)
