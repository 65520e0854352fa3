"""Fine-tuning: what is trained, what is not, and that a run is a function of its arguments."""

import dataclasses
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lordjax.data.examples import Data, Examples, next_tokens
from lordjax.finetune import adapters, memory, recipes, training_run
from lordjax.finetune import step as finetune
from lordjax.finetune.recipes import RECIPES, Recipe
from lordjax.finetune.step import Settings
from lordjax.finetune.training_run import Keeping, train
from lordjax.kernels import trees
from lordjax.kernels.base import materialize, matmul, nbytes
from lordjax.kernels.convert import encode, factorize
from lordjax.kernels.kinds import weights
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized
from lordjax.models import ModelConfig, Transformer, init
from lordjax.runtime.mesh import make_mesh

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=32,
    tie_embeddings=True,
)
BLOCKS = r"layer_\d+/.*/kernel$"


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, jax.random.key(0))


def examples(count=8, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (count, length), np.int32)
    return Examples(tokens, next_tokens(tokens, np.ones(tokens.shape, bool)))


def coded(params):
    return encode(params, "nf4", where=BLOCKS)


# Every kind of kernel that something is trained in: how it is made, and what is trained.
KINDS = {
    "matrices": (lambda p: p, r"/kernel$"),
    "pairs": (lambda p: factorize(p, keep=0.6, where=BLOCKS), recipes.FACTORS),
    "over matrices": (lambda p: p, recipes.PRODUCTS),
    "over pairs": (lambda p: factorize(p, keep=0.6, where=BLOCKS), recipes.PRODUCTS),
    "over codes": (coded, recipes.PRODUCTS),
    "over pairs of codes": (
        lambda p: adapters.encode_bases(factorize(p, keep=0.6, where=BLOCKS), "nf4"),
        recipes.PRODUCTS,
    ),
    "norms": (coded, r"norm/scale$"),
}


def made(params, kind):
    """A model and the paths of what is trained; products are not 0."""
    make, pattern = KINDS[kind]
    new = make(params)
    if pattern == recipes.PRODUCTS:
        new = adapters.add_adapters(new, rank=3, key=jax.random.key(1))
        rng = np.random.default_rng(2)
        noise = {p: rng.normal(size=a.shape) for p, a in trees.arrays(new).items()}
        leaves, structure = jax.tree.flatten(new)
        pairs = zip(trees.arrays(new), leaves, strict=True)
        moved = [
            jnp.asarray(0.1 * noise[p], a.dtype) if p.endswith("low_rank/right") else a
            for p, a in pairs
        ]
        new = jax.tree.unflatten(structure, moved)
    return new, adapters.trainable(new, (pattern,))


@pytest.mark.parametrize("kind", KINDS)
def test_split_and_join(params, kind):
    new, paths = made(params, kind)
    first, second = trees.split(new, set(paths))
    assert len(jax.tree.leaves(first)) == len(paths)
    assert len(jax.tree.leaves(second)) == len(jax.tree.leaves(new)) - len(paths)
    again = trees.join(first, second)
    assert jax.tree.structure(again) == jax.tree.structure(new)
    jax.tree.map(np.testing.assert_array_equal, again, new)


def test_split_names_what_is_not_there(params):
    with pytest.raises(KeyError, match=r"layer_0/attention/q/kernel/left.*did you mean"):
        trees.split(params, {"layer_0/attention/q/kernel/left"})


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(params, kind):
    """In double precision."""
    new, paths = made(params, kind)
    trained, frozen = trees.split(new, set(paths))
    batch = examples(2)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), trained)
        rest = jax.tree.map(lambda a: a, frozen)

        def loss(trained):
            whole = trees.join(trained, rest)
            # Activations have the dtype of the embedding.
            whole = {**whole, "embed": jax.tree.map(lambda a: a.astype("float64"), whole["embed"])}
            nll, _ = finetune.rows_of(CONFIG, whole, batch)
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
        step = 1e-3 / float(norm)

        def moved(size):
            return loss(jax.tree.map(lambda a, w: a + size * w, wide, way))

        there, back = moved(step), moved(-step)
        measured = (there - back) / (2 * step)
    # The logits of a chunk are float32.
    np.testing.assert_allclose(inner, measured, rtol=2e-2)


def test_new_adapters_change_nothing(params):
    for make in (lambda p: p, coded, lambda p: factorize(p, keep=0.6, where=BLOCKS)):
        before = make(params)
        after = adapters.add_adapters(before, rank=4, key=jax.random.key(0))
        tokens = examples().tokens
        a, b = (Transformer(CONFIG).apply({"params": p}, tokens) for p in (before, after))
        np.testing.assert_array_equal(a, b)
        found = trees.flatten(after)
        assert all(isinstance(found[p], LowRankPlusQuantized) for p in trees.select(found, BLOCKS))


def test_adapters_that_do_not_fit(params):
    with pytest.raises(ValueError, match=r"layer_0/attention/k/kernel \(32, 16\): an adapter of"):
        adapters.add_adapters(params, rank=17, key=jax.random.key(0))


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


def test_codes_under_every_block_matrix(params):
    mixed = factorize(params, keep=0.6, where="mlp/.*kernel$")
    new = adapters.encode_bases(mixed, "nf4")
    assert nbytes(
        {p: a for p, a in trees.flatten(new).items() if p.endswith("kernel")}
    ) < 0.2 * sum(4 * weights(a) for p, a in trees.flatten(mixed).items() if p.endswith("kernel"))
    again = adapters.encode_bases(new, "nf4")
    jax.tree.map(np.testing.assert_array_equal, again, new)
    assert adapters.trainable(new, (".",)) == [
        p for p in trees.arrays(new) if not p.endswith(("codes", "scales", "supers", "offset"))
    ]


def test_recipes_on_a_model_without_what_they_train(params):
    with pytest.raises(KeyError, match=r"trains kernel/low_rank/.*of which the model has nothing"):
        recipes.start(RECIPES["lq-lora"], params, jax.random.key(0))


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
    """Rank 64; the paper's counts (arXiv 2311.12023)."""
    kv = {"num_kv_heads": size.get("num_kv_heads", 32)}
    config = dataclasses.replace(CONFIG, **{**size, **kv}, head_size=128, vocab_size=32000)

    def shapes():
        return adapters.add_adapters(
            init(config, jax.random.key(0)), rank=64, key=jax.random.key(0)
        )

    arrays = trees.arrays(jax.eval_shape(shapes))
    assert sum(a.size for p, a in arrays.items() if "/low_rank/" in p) == expected


def steps(params, recipe, settings, data=None, **options):
    """Every state's trained arrays and metrics."""
    data = examples() if data is None else data
    begun = finetune.begin(CONFIG, params, recipe, settings)
    given = (begun.state, begun.frozen, data, begun.optimizer, settings)
    run = finetune.run(CONFIG, *given, **options)
    return [(jax.tree.map(np.array, state.params), metrics) for state, metrics in run]


def losses(found):
    return np.array([metrics["loss"] for _, metrics in found])


def test_eight_examples_are_learned_by_heart(params):
    found = steps(params, dataclasses.replace(RECIPES["full"], learning_rate=1e-2), Settings(120))
    assert losses(found)[-1] < 0.05 < 1 < losses(found)[0]


def test_only_what_is_named_changes(params):
    base = coded(params)

    def digest(tree):
        return hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(tree)))

    before = digest(base).hexdigest()
    data = Data(examples(), examples(0), {})
    recipe = dataclasses.replace(RECIPES["qlora"], rank=4, learning_rate=1e-2)
    start, paths = recipes.start(recipe, base, jax.random.key(0))
    trained, frozen = finetune.split(start, paths, "float32")
    optimizer = recipes.optimizer(recipe, 5)
    run = finetune.run(
        CONFIG, finetune.start(trained, optimizer), frozen, data.train, optimizer, Settings(5)
    )
    *_, (state, _) = run
    end = trees.arrays(finetune.joined(state.params, start, paths))
    for path, a in trees.arrays(start).items():
        assert np.array_equal(a, end[path]) == ("low_rank" not in path), path
    assert digest(base).hexdigest() == before


def test_accumulation_changes_nothing_but_memory(params):
    """Micro-batches with different numbers of targets count by targets, not by batches."""
    data = examples()
    few = data.targets.copy()
    few[:3, 4:] = -1
    data = data._replace(targets=few)
    whole, parts = (steps(params, RECIPES["full"], Settings(4, 8, n), data) for n in (1, 4))
    np.testing.assert_allclose(losses(whole), losses(parts), rtol=1e-5)
    assert [m["targets"] for _, m in whole] == [int((few >= 0).sum())] * 4


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


def test_padding_is_not_seen(params):
    short = examples(8, 10)
    wide = [
        np.pad(a, ((0, 0), (0, 6)), constant_values=v)
        for a, v in zip(short[:2], (5, -1), strict=True)
    ]
    padded = Examples(*wide, np.broadcast_to(np.arange(16) < 10, (8, 16)))
    a, b = (steps(params, RECIPES["full"], Settings(3), data) for data in (short, padded))
    np.testing.assert_allclose(losses(a), losses(b), rtol=1e-5)


@pytest.mark.parametrize("scale", [0.25, pytest.param(2.0, marks=pytest.mark.slow)])
def test_alpha_is_a_learning_rate(params, scale):
    """LoRA's ``x A B · alpha / r`` under Adam, and ours, in which the factor is no part."""
    rank, rate, key = 4, 1e-3, jax.random.key(0)
    recipe = Recipe((recipes.PRODUCTS,), rank=rank, alpha=scale * rank, learning_rate=rate)
    recipe = dataclasses.replace(recipe, schedule="constant", warmup=0.0, clip=None)
    found = steps(params, recipe, Settings(6, accumulate=1))

    plain = adapters.add_adapters(params, rank=rank, key=jax.random.key(0))
    paths = adapters.trainable(plain, (recipes.PRODUCTS,))
    trained, frozen = trees.split(plain, set(paths))
    optimizer = optax.adamw(rate, weight_decay=0.0)

    def loss(trained, part):
        def times(leaf):
            left = scale * leaf.low_rank.left
            return LowRankPlusQuantized(leaf.base, LowRank(left, leaf.low_rank.right))

        whole = trees.map_with_path(
            lambda _, leaf: times(leaf) if isinstance(leaf, LowRankPlusQuantized) else leaf,
            trees.join(trained, frozen),
        )
        nll, _ = finetune.rows_of(CONFIG, whole, part)
        return jnp.sum(nll) / int((part.targets >= 0).sum())

    state, theirs = optimizer.init(trained), []
    for i in range(6):
        part = jax.tree.map(
            lambda a: a[0], finetune.microbatches(examples(), Settings(6, accumulate=1), i)
        )
        value, gradient = jax.value_and_grad(loss)(trained, part)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, trained)
        trained = optax.apply_updates(trained, updates)
        theirs.append(float(value))
    assert key is not None
    np.testing.assert_allclose(losses(found), theirs, rtol=2e-4)
    assert abs(theirs[-1] - theirs[0]) > 1e-2


def test_a_pupil_who_is_the_teacher_learns_nothing(params):
    settings = Settings(1, distill=1.0)
    (_, metrics), *_ = steps(params, RECIPES["full"], settings, teacher=params)
    assert abs(metrics["loss"]) < 1e-6
    assert metrics["gradient"] < 1e-4 < metrics["nll"]


def test_distillation_comes_nearer_to_the_teacher(params):
    small = factorize(params, keep=0.4, where=BLOCKS)
    recipe = dataclasses.replace(RECIPES["factors"], learning_rate=3e-3)
    found = steps(small, recipe, Settings(40, distill=1.0), teacher=params)
    assert losses(found)[-1] < 0.5 * losses(found)[0]
    with pytest.raises(ValueError, match="distillation needs a teacher"):
        steps(small, recipe, Settings(1, distill=0.5))


def test_classifiers_are_not_distilled():
    config = dataclasses.replace(CONFIG, head="classes", num_classes=2)
    run = finetune.run(config, None, None, None, None, Settings(1, distill=0.5), teacher={})
    with pytest.raises(ValueError, match="only models that predict tokens are distilled"):
        next(run)


def test_block_by_block_changes_no_gradient(params):
    def loss(params, **how):
        return jnp.sum(finetune.rows_of(CONFIG, params, examples(), **how)[1])

    trained = tuple(trees.arrays(params))
    plain = jax.grad(loss)(params)
    for remat in (False, True):
        found = jax.grad(functools.partial(loss, trained=trained, remat=remat))(params)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, plain
        )


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
    with pytest.raises(ValueError, match="schedule 'steps'; known: constant"):
        recipes.optimizer(Recipe((".",), schedule="steps"), 3)


# --- runs on disk ---------------------------------------------------------------------------------

RUN = """
import sys, jax
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_finetune as t
data = t.Data(t.examples(), t.examples(4, seed=1), {{}})
recipe = t.dataclasses.replace(t.RECIPES["lora"], rank=4, learning_rate=1e-2)
t.train(t.CONFIG, t.init(t.CONFIG, jax.random.key(0)), data, recipe, t.Settings(40, 4, 2),
        Path(sys.argv[1]), about={{"data": 1}}, keeping=t.Keeping(8), resume=True,
        report=lambda line: print(line["step"], flush=True))
"""


def process(directory):
    code = RUN.format(tests=os.path.dirname(__file__))
    return subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE)


def finished(directory):
    with process(directory) as run:
        run.stdout.read()
        assert run.wait() == 0


def metrics_of(directory):
    lines = map(json.loads, (directory / training_run.METRICS).read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(whole)
    for stop in (11, 27):
        run = process(broken)
        for line in run.stdout:
            if int(line) >= stop:
                break
        time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        run.stdout.close()
    finished(broken)
    assert metrics_of(broken) == metrics_of(whole)
    assert len(metrics_of(whole)) == 40 + 1 + 5


def short_run(params, directory, count=12, **options):
    data = Data(examples(), examples(4, seed=1), {})
    recipe = dataclasses.replace(RECIPES["lora"], rank=4, learning_rate=1e-2)
    given = {"about": {"data": "a"}, "keeping": Keeping(3, 2), **options}
    return train(CONFIG, params, data, recipe, Settings(count, 4), directory, **given)


def test_the_best_and_the_last_are_kept(params, tmp_path):
    trained = short_run(params, tmp_path / "run")
    held = {line["step"]: line["validation"] for line in trained.history if "validation" in line}
    del held[0]
    assert trained.best == min(held, key=held.get)
    there = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert there == {9, 12, trained.best}
    own = finetune.evaluate(
        CONFIG,
        finetune.State(jnp.zeros((), jnp.int32), trained.params, None),
        jax.tree.map(lambda a: None, trained.params),
        examples(4, seed=1),
        batch=3,
        dtype="float32",
    )
    np.testing.assert_allclose(own, held[trained.best], rtol=1e-5)


def test_another_run_is_not_resumed(params, tmp_path):
    short_run(params, tmp_path / "run", 3)
    with pytest.raises(FileExistsError, match="a run is there; go on with --resume"):
        short_run(params, tmp_path / "run", 3)
    with pytest.raises(ValueError, match=r"another one: data was 'a' and is 'b'"):
        short_run(params, tmp_path / "run", 3, resume=True, about={"data": "b"})
    with pytest.raises(ValueError, match=r"settings\.steps was 3 and is 6"):
        short_run(params, tmp_path / "run", 6, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty, and not a run"):
        short_run(params, tmp_path / "other", 3)


def test_a_finished_run_is_resumed_to_the_same(params, tmp_path):
    first = short_run(params, tmp_path / "run", 6)
    again = short_run(params, tmp_path / "run", 6, resume=True)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.history == again.history


def test_a_trained_product_is_what_is_multiplied(params):
    new, _ = made(params, "over codes")
    leaf = new["layer_0"]["mlp"]["up"]["kernel"]
    x = jax.random.normal(jax.random.key(0), (5, 32))
    np.testing.assert_allclose(matmul(x, leaf), x @ materialize(leaf), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["full", "qlora"])
def test_memory_is_about_what_the_compiler_lays_out(recipe):
    """Of a model whose hidden states outweigh what the count leaves out."""
    config = dataclasses.replace(
        CONFIG, hidden_size=256, mlp_size=768, num_heads=8, num_kv_heads=4, head_size=32
    )
    row = recipes.changed(RECIPES[recipe], rank=8 if RECIPES[recipe].rank else None)

    def sizes(layers):
        own = dataclasses.replace(config, num_layers=layers)
        shapes = jax.eval_shape(lambda: init(own, jax.random.key(0)))
        given = (own, shapes, row, Settings(1, 4, 4), 256)
        return memory.predict(*given), memory.compiled(*given)

    said, found = sizes(3)
    state = 3 / memory.COPIES * said["trained"]  # parameters and moments
    assert said["base"] + state == pytest.approx(found["arguments"], rel=0.01)
    if recipe == "full":
        assert 0.7 < said["total"] / found["total"] < 1.3


@pytest.mark.slow
def test_decoded_matrices_do_not_pile_up():
    """Blocks over codes add no more to what a step holds than blocks over matrices do."""
    config = dataclasses.replace(CONFIG, hidden_size=256, mlp_size=768, head_size=64)
    coded = recipes.changed(RECIPES["qlora"], rank=2)
    added = {}
    for name, row in (("codes", coded), ("matrices", dataclasses.replace(coded, codes=None))):
        sizes = []
        for layers in (2, 5):
            own = dataclasses.replace(config, num_layers=layers)
            shapes = jax.eval_shape(functools.partial(init, own), jax.random.key(0))
            sizes.append(memory.compiled(own, shapes, row, Settings(1, 4, 4), 16)["temporaries"])
        added[name] = sizes[1] - sizes[0]
    arrays = trees.arrays(shapes)
    block = sum(4 * a.size for path, a in arrays.items() if path.startswith("layer_0/"))
    assert added["codes"] - added["matrices"] < 0.5 * 3 * block


def test_remat_holds_the_inside_of_one_block():
    """Compiled with optimisation, which would find that something is computed twice."""
    config = dataclasses.replace(CONFIG, hidden_size=64, mlp_size=1024)
    row, sizes = recipes.changed(RECIPES["lora"], rank=2), []
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        for layers in (2, 5):
            own = dataclasses.replace(config, num_layers=layers)
            shapes = jax.eval_shape(functools.partial(init, own), jax.random.key(0))
            sizes.append(memory.compiled(own, shapes, row, Settings(1, 4, 1), 256)["temporaries"])
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    hidden = 4 * 256 * config.mlp_size * 4
    assert (sizes[1] - sizes[0]) / 3 < hidden  # of which a block has three
