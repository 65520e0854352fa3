"""Theorems of whole heads: identity when all stay, exact errors, the best head goes first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import gradients, metric, mixed, moments, vo_problem

from lordjax.methods.modular.heads import heads, heads_errors, prune_heads

pytestmark = pytest.mark.usefixtures("double")

run = jax.jit(heads)

MANY = 1e8  # tokens that the statistics count as: the ridge of the refit vanishes


def problem(groups=3, per_group=2, length=300, seed=0):
    """Kernels, mixed values ``[s, h·d]``, and statistics."""
    kernels, x, probabilities = vo_problem(groups, per_group, length=length, seed=seed)
    rng = np.random.default_rng(seed)
    kernels |= {"q": rng.normal(size=(16, groups * per_group, 6))}
    kernels |= {"k": rng.normal(size=(16, groups, 6))}
    kernels |= {"q_bias": rng.normal(size=(groups * per_group, 6))}
    z = mixed(kernels, x, probabilities).reshape(length, -1)
    found = moments(z)
    scale = MANY / length
    found = dataclasses.replace(found, count=found.count * scale, scatter=found.scatter * scale)
    arrays = {name: jnp.asarray(a) for name, a in kernels.items()}
    return arrays, z, {"moments": found, "gradients": gradients(16)}


def columns(kept, groups, count):
    size = count // groups
    return np.concatenate([np.arange(g * size, (g + 1) * size) for g in kept])


def refit_error(z, kernel, at, m):
    """Least error in the metric M of the outputs that the columns ``at`` of z can reach."""
    gap = z @ kernel - z[:, at] @ np.linalg.lstsq(z[:, at], z @ kernel, rcond=None)[0]
    return np.einsum("ti,ij,tj->", gap, m, gap) / len(z)


def test_all_heads_give_the_same_module():
    kernels, _, stats = problem()
    new = prune_heads(kernels, run(kernels, stats), 3)
    for name in ("q", "k", "v", "q_bias", "v_bias"):
        np.testing.assert_array_equal(new[name], kernels[name])
    np.testing.assert_allclose(new["o"], kernels["o"], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_errors_are_those_of_the_refit_and_the_least_head_goes_first(seed):
    kernels, z, stats = problem(seed=seed)
    factors, m = run(kernels, stats), metric(stats["gradients"])
    kernel = np.asarray(kernels["o"]).reshape(z.shape[1], -1)
    order = np.asarray(factors.parts["order"])
    errors = np.append(np.cumsum(np.asarray(factors.spectrum)[::-1])[::-1], 0)
    for count in (1, 2):
        at = columns(np.sort(order[:count]), 3, z.shape[1])
        assert errors[count] == pytest.approx(refit_error(z, kernel, at, m), rel=1e-4)
        new = prune_heads(kernels, factors, count)
        gap = z @ kernel - z[:, at] @ new["o"].reshape(len(at), -1)
        measured = np.einsum("ti,ij,tj->", gap, m, gap) / len(z)
        assert measured == pytest.approx(errors[count], rel=1e-4)
    pairs = [[g for g in range(3) if g != drop] for drop in range(3)]
    best = min(refit_error(z, kernel, columns(kept, 3, z.shape[1]), m) for kept in pairs)
    assert errors[2] == pytest.approx(best, rel=1e-4)


def test_queries_stay_with_their_keys_and_values():
    kernels, _, stats = problem()
    factors = run(kernels, stats)
    new = prune_heads(kernels, factors, 2)
    kept = np.sort(np.asarray(factors.parts["order"])[:2])
    np.testing.assert_array_equal(new["k"], np.asarray(kernels["k"])[:, kept])
    np.testing.assert_array_equal(new["v_bias"], np.asarray(kernels["v_bias"])[kept])
    queries = np.concatenate([[2 * g, 2 * g + 1] for g in kept])
    np.testing.assert_array_equal(new["q"], np.asarray(kernels["q"])[:, queries])
    assert new["o"].shape == (4, 6, 16)


def test_errors_by_other_tokens():
    kernels, _, stats = problem()
    _, z, others = problem(seed=3)
    factors, m = run(kernels, stats), metric(others["gradients"])
    kernel = np.asarray(kernels["o"]).reshape(z.shape[1], -1)
    found = np.asarray(heads_errors(kernels, factors, others))
    expected = []
    for count in (1, 2):
        new = prune_heads(kernels, factors, count)
        at = columns(np.sort(np.asarray(factors.parts["order"])[:count]), 3, z.shape[1])
        gap = z @ kernel - z[:, at] @ new["o"].reshape(len(at), -1)
        expected.append(np.einsum("ti,ij,tj->", gap, m, gap) / len(z))
    envelope = np.maximum.accumulate(expected[::-1])[::-1]  # fewer heads never do better
    np.testing.assert_allclose(found[1:3], envelope, rtol=1e-4)
    assert found[3] == pytest.approx(0, abs=1e-6 * found[0])
