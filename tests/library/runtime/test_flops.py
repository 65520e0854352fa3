"""Operation counts agree with XLA's own, and with the programs that a compression runs."""

import dataclasses
import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, source

from lordjax.calibration import backward_pass, forward_pass
from lordjax.compression import site_factors
from lordjax.compression.low_rank import prepare
from lordjax.compression.measured import variants
from lordjax.forecast.calibration_cost import blocks_ops, recomputed
from lordjax.forecast.job import CompressionSpec
from lordjax.forecast.low_rank_cost import stages
from lordjax.forecast.shapes import dense_shapes
from lordjax.methods import linalg
from lordjax.models.attention import fused
from lordjax.models.blocks import MLP
from lordjax.names import layer_index
from lordjax.runtime import flops


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def compiled(fn, *args):
    """Returns XLA's own count, for programs without loops."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.quick("96")
@pytest.mark.parametrize("width", [96, 640])
def test_products_are_those_that_xla_counts(width):
    """Equal up to additions and means, which are not counted."""
    rows = array(300, width)
    assert flops.total(flops.count_ops(linalg.gram, rows)) == pytest.approx(
        compiled(linalg.gram, rows), rel=2e-3
    )


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_an_mlp_costs_what_xla_counts(name):
    config = BLOCKS[name]
    block = dense_shapes(config).block(0)["mlp"]

    def run(params, x):
        return MLP(config).apply({"params": params}, x)

    x = array(8, 48, config.hidden_size)
    ours, theirs = flops.total(flops.count_ops(run, block, x)), compiled(run, block, x)
    assert ours <= theirs <= 1.25 * ours  # activations and biases


def test_the_gradient_of_a_product_costs_twice_the_product():
    a, b = array(160, 170), array(170, 180)

    def loss(a, b):
        return jnp.sum(linalg.mm(a, b) ** 2)

    both = flops.total(flops.count_ops(jax.grad(loss, argnums=(0, 1)), a, b))
    assert both == 3 * 2 * 160 * 170 * 180
    assert both == pytest.approx(compiled(jax.grad(loss, argnums=(0, 1)), a, b), rel=0.02)


@pytest.mark.quick("svd")
@pytest.mark.parametrize("fn", [jnp.linalg.eigh, jnp.linalg.cholesky, jnp.linalg.svd])
def test_factorisations_grow_with_the_third_power(fn):
    once, twice = (flops.total(flops.count_ops(fn, array(n, n))) for n in (64, 128))
    assert once > 0
    assert twice == pytest.approx(8 * once, rel=1e-4)  # counts are whole numbers


def test_loops_count_as_often_as_they_run():
    a = array(16, 16)
    once = flops.total(flops.count_ops(jnp.matmul, a, a))

    def loop(a):
        return jax.lax.fori_loop(0, 7, lambda _, x: x @ a, a)

    many = flops.count_ops(lambda xs: jax.lax.map(lambda x: x @ x, xs), array(5, 16, 16))
    assert flops.total(flops.count_ops(loop, a)) == 7 * once
    assert flops.total(many) == 5 * once


def test_what_nobody_uses_is_not_counted():
    both = jax.jit(lambda a: (a @ a, jnp.linalg.eigh(a)[0]))
    a = array(16, 16)
    assert flops.total(flops.count_ops(lambda a: both(a)[0], a)) == 2 * 16**3


def test_kinds_of_products():
    a, thin = array(256, 256), array(256, flops.THIN)
    assert set(flops.count_ops(jnp.matmul, a, a)) >= {
        "product float32 highest"
    }  # as conftest.py asks
    assert set(flops.count_ops(jnp.matmul, a, thin)) >= {"thin float32 highest"}
    with jax.enable_x64(True):
        wide = array(256, 256, dtype=jnp.float64)
        assert set(flops.count_ops(jnp.matmul, wide, wide)) >= {"product float64"}


METHODS = ["lord", "fwsvd", "modegpt-cr", "modegpt-published"]


def counting(work, stage, fn):
    """Returns a function that counts its operations before it runs."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), args)
        work[stage] += flops.total(flops.count_ops(functools.partial(fn, **kwargs), *shapes))
        return fn(*args, **kwargs)

    return run


def on_host_counted(module, done):
    """Returns a module whose operations on the host are counted."""
    if module.host is None:
        return module

    def run(kernels, stats, **options):
        done["factors"] += flops.total(module.host_work(kernels, stats))
        return module.host(kernels, stats, **options)

    def errors(kernels, factors, stats):
        n, m = kernels["down"].shape
        done["factors"] += 2 * n**3 + n**2 * m  # two solves with a triangle, and a product
        return module.host_errors(kernels, factors, stats)

    return dataclasses.replace(module, host=run, host_errors=errors)


def counted_head(done, fn):
    def run(config, *args):
        return counting(done, "check", functools.partial(fn, config))(*args)

    return run


def counted_program(done, make):
    def made(*key):
        program = make(*key)
        return None if program is None else counting(done, "factors", program)

    return made


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("lord", "bert-classifier"),
        ("modegpt-published", "gpt2"),
        *(pytest.param(method, "gpt2", marks=pytest.mark.slow) for method in METHODS[:-1]),
        pytest.param("lord", "gemma2", marks=pytest.mark.slow),
    ],
)
def test_a_preparation_runs_what_was_counted(method, name, monkeypatch):
    model, done = source(name), Counter()
    windows, length, few = 8, 24, 4
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (windows, length))
    job = CompressionSpec(model.config, method, windows, length, gradient_windows=few)
    expected = stages(job)
    for stage, names in {
        "passes": ("observe", "observe_gradients", "loss_gradient", "embed"),
        "bases": ("gradient_basis",),
    }.items():
        for module, each in itertools.product((forward_pass, backward_pass), names):
            if hasattr(module, each):
                counted = counting(done, stage, getattr(module, each))
                monkeypatch.setattr(module, each, counted)
    monkeypatch.setattr(variants, "observe", counting(done, "check", variants.observe))
    for each in ("losses", "decisions"):
        monkeypatch.setattr(variants, each, counted_head(done, getattr(variants, each)))
    for each in ("factor_program", "errors_program"):
        program = counted_program(done, getattr(site_factors, each))
        monkeypatch.setattr(site_factors, each, program)
    rows = site_factors.METHODS
    modules = {kind: on_host_counted(m, done) for kind, m in rows[method].modules.items()}
    row = dataclasses.replace(rows[method], modules=modules)
    monkeypatch.setitem(rows, method, row)
    found = prepare(model, tokens, method=method, gradient_windows=few, mask_token=1)
    prepared = {name: expected[name] for name in expected if name in PREPARES}
    # Refits on the host, of modules that are checked.
    prepared.get("held-out check", Counter()).pop("cholesky float64", None)
    counted = sum(map(flops.total, prepared.values()))
    for row in found.checked[-1:]:  # a plan may leave the first blocks as they are
        first = min(map(layer_index, row["ranks"]))
        ops = flops.total(blocks_ops(job, job.held_out, {}))
        counted -= first / model.config.num_layers * ops
    assert counted == pytest.approx(sum(done.values()), rel=1e-6)


PREPARES = ("gradients", "statistics", "factors", "held-out check")


@pytest.mark.quick("lord")
@pytest.mark.parametrize("method", ["lord", "modegpt", "svd-llm"])
def test_passes_are_linear_in_windows(method):
    def job(windows):
        return CompressionSpec(BLOCKS["starcoder2"], method, windows, 40, gradient_windows=None)

    few, many = (stages(job(n + job(n).held_out)) for n in (48, 96))
    assert flops.total(many["factors"]) == flops.total(few["factors"])
    for stage in set(few) & {"gradients", "statistics"}:
        bases = 0.0
        if stage == "gradients":  # the coordinates of gradients, once
            bases = sum(n for kind, n in few[stage].items() if kind.startswith("cholesky"))
        one, two = (flops.total(work[stage]) - bases for work in (few, many))
        assert two == pytest.approx(2 * one, rel=1e-9)


def test_gradients_stop_at_their_windows():
    few, many = (
        stages(CompressionSpec(BLOCKS["gpt2"], "lord", n, 32, gradient_windows=8))["gradients"]
        for n in (16, 64)
    )
    assert flops.total(few) == flops.total(many)


def test_what_is_made_twice_is_a_forward_pass():
    """Recomputation is a part of the backward pass; methods without one have none."""
    job = CompressionSpec(BLOCKS["gpt2"], "lord", 8, 32)
    assert 0 < recomputed(job) < flops.total(stages(job)["gradients"]) / 2
    assert recomputed(CompressionSpec(BLOCKS["gpt2"], "svd-llm", 8, 32)) == 0


@pytest.mark.full
def test_more_tokens_cost_more():
    counts = [
        sum(map(flops.total, stages(CompressionSpec(BLOCKS["qwen3"], "modegpt", 8, n)).values()))
        for n in (16, 32, 48)
    ]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("method", "windows", "length", "message"),
    [
        ("svd", 0, 16, "at least 1 sequence .* of 2 tokens"),
        ("svd", 4, 1, "at least 1 sequence .* of 2 tokens"),
        ("modegpt-published", 1, 16, r"at least 2 \(--samples\)"),
    ],
)
def test_bad_jobs(method, windows, length, message):
    with pytest.raises(ValueError, match=message):
        CompressionSpec(BLOCKS["gpt2"], method, windows, length)


def test_fused_attention_counts_as_its_causal_products():
    batch, length, heads, width = 2, 256, 4, 32
    arrays = [jnp.zeros((batch, length, heads, width), jnp.bfloat16)] * 3

    def loss(*arrays):
        return fused(*arrays, scale=1.0).astype(jnp.float32).sum()

    product = batch * heads * length**2 * width  # half of the square
    forward = flops.count_ops(loss, *arrays)
    both = flops.count_ops(jax.grad(loss, argnums=(0, 1, 2)), *arrays)
    assert forward["product bfloat16"] == 2 * product
    assert both["product bfloat16"] == (2 + 7) * product
