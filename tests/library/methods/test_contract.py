"""The contract of every method in `METHODS`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import METHOD_NAMES, degenerate, degenerate_modules, inputs, problems

from lordjax.kernels.low_rank import LowRank
from lordjax.methods import METHODS, truncate

SHAPES = [(24, 24), (24, 16), (16, 40)]


@pytest.fixture(params=METHOD_NAMES)
def factor(request):
    return METHODS[request.param].factor


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_order(factor, shape):
    kernel, stats = inputs(shape)
    factors = factor(kernel, stats)
    width = min(shape)
    assert factors.left.shape == (shape[0], width)
    assert factors.right.shape == (width, shape[1])
    spectrum = np.asarray(factors.spectrum)
    assert spectrum.shape == (width,)
    assert (spectrum >= 0).all()
    assert (np.diff(spectrum) <= 1e-5 * spectrum[0]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_jit_equals_eager(factor, shape):
    kernel, stats = inputs(shape)
    eager, jitted = factor(kernel, stats), jax.jit(factor)(kernel, stats)
    scale = float(eager.spectrum[0])
    np.testing.assert_allclose(jitted.spectrum, eager.spectrum, atol=1e-4 * scale)
    rank = min(shape) // 2
    np.testing.assert_allclose(
        truncate(jitted, rank)[0].materialize(), truncate(eager, rank)[0].materialize(), atol=1e-3
    )


def test_deterministic_and_input_untouched(factor):
    kernel, stats = inputs((24, 16))
    before = jax.tree.map(np.array, (kernel, stats))
    first, second = jax.jit(factor)(kernel, stats), jax.jit(factor)(kernel, stats)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, (kernel, stats), before)


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_error_vanishes_at_full_rank_and_rank_is_kept(factor, shape):
    kernel, stats = inputs(shape)
    factors = factor(kernel, stats)
    for rank in (1, min(shape) // 2, min(shape)):
        new, _ = truncate(factors, rank)
        assert isinstance(new, LowRank)
        assert new.shape == shape
        assert new.rank == rank
        assert np.linalg.matrix_rank(np.asarray(new.materialize()), tol=1e-3) <= rank
    np.testing.assert_allclose(new.materialize(), kernel, atol=2e-3)


def test_under_vmap(factor):
    stack = [inputs((24, 16), seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    many = jax.vmap(factor)(*stacked)
    for i, (kernel, stats) in enumerate(stack):
        alone = factor(kernel, stats)
        np.testing.assert_allclose(many.spectrum[i], alone.spectrum, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")  # users have such pipelines
def test_under_pmap(factor):
    devices = jax.device_count()
    stack = [inputs((24, 16), seed) for seed in range(devices)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *stack)
    many = jax.pmap(factor)(*stacked)
    alone = factor(*stack[-1])
    np.testing.assert_allclose(many.spectrum[-1], alone.spectrum, rtol=1e-3, atol=1e-3)


def test_sharded_kernel(factor):
    mesh = Mesh(np.array(jax.devices()), ("rows",))
    kernel, stats = inputs((24, 16))
    sharded = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec("rows", None)))
    here, there = factor(kernel, stats), jax.jit(factor)(sharded, stats)
    np.testing.assert_allclose(there.spectrum, here.spectrum, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_reads_only_what_it_declares(name):
    """A method must work with exactly the statistics in its `needs`."""
    method = METHODS[name]
    kernel, stats = inputs((24, 16))
    have = {"moments": "input"}
    given = {have.get(need, need): stats[have.get(need, need)] for need in method.needs}
    factors = method.factor(kernel, given)
    assert (factors.mean_out is not None) == method.bias


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_has_a_summary_for_the_command_line(name):
    assert 10 < len(METHODS[name].summary) < 90


@pytest.mark.full
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.modules))
def test_modules_are_jittable_and_read_only_what_they_declare(name):
    given_problems = problems()
    for kind, module in METHODS[name].modules.items():
        kernels, stats = given_problems[kind]
        arrays = {n: jnp.asarray(a) for n, a in kernels.items()}
        given = {need: stats[need] for need in module.needs}
        eager, jitted = module.factor(arrays, given), jax.jit(module.factor)(arrays, given)
        np.testing.assert_allclose(jitted.spectrum, eager.spectrum, atol=1e-8)
        for have, want in zip(*map(jax.tree.leaves, (jitted.parts, eager.parts)), strict=True):
            np.testing.assert_allclose(have, want, atol=1e-6)


@pytest.mark.quick("lord-*", "lord-affine-*")
@pytest.mark.parametrize("what", degenerate())
def test_degenerate_inputs_have_finite_factors(factor, what):
    """Valid models have matrices of zeros, dead inputs and layers without gradients."""
    kernel, stats = degenerate()[what]
    factors = factor(kernel, stats)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(factors))
    spectrum = np.asarray(factors.spectrum)
    assert (spectrum >= 0).all() and (np.diff(spectrum) <= 1e-5 * spectrum[0]).all()
    whole, _ = truncate(factors, min(kernel.shape))
    np.testing.assert_allclose(whole.materialize(), kernel, atol=2e-3)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_kernel_that_the_loss_does_not_depend_on_costs_little(name):
    """So a global budget goes to the others; a method without gradients cannot know it."""
    method = METHODS[name]
    spectra = {
        what: float(method.factor(*degenerate()[what]).spectrum.sum())
        for what in ("no gradients", "a constant input")
    }
    if {"gradients", "row_fisher"} & set(method.needs):
        assert spectra["no gradients"] < 1e-9 * spectra["a constant input"]
    else:
        assert spectra["no gradients"] > 0


@pytest.mark.full
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.modules))
def test_degenerate_modules_have_finite_factors_and_widths(name):
    for kind, module in METHODS[name].modules.items():
        width = {"qk": 4, "heads": 1}.get(kind, 3)
        for what, (kernels, stats) in degenerate_modules(kind).items():
            given = {need: stats[need] for need in module.needs}
            arrays = {n: jnp.asarray(a) for n, a in kernels.items()}
            factors = module.factor(arrays, given)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(factors)), (kind, what)
            assert (np.asarray(factors.spectrum) >= 0).all(), (kind, what)
            new = module.prune(kernels, factors, width)
            assert all(np.isfinite(leaf).all() for leaf in new.values()), (kind, what)
