"""Theorems of query and key heads: selections, exact errors, rotation."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    FREQUENCIES,
    heads,
    project,
    qk_problem,
)

from lordjax.methods.modular.query_key import prune_query_key, query_key
from lordjax.models.rope import rotate

pytestmark = pytest.mark.usefixtures("double")


def logits(x, kernels, positions=None):
    """Returns the unscaled logits ``[h, s, t]``."""
    q, k = (project(x, kernels, name, positions) for name in "qk")
    return np.einsum("shd,thd->hst", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1))


def run_qk(x, kernels, width, positions=None, **options):
    stats = {
        "queries": heads(project(x, kernels, "q", positions)),
        "keys": heads(project(x, kernels, "k", positions)),
    }
    factors = query_key({n: jnp.asarray(a) for n, a in kernels.items()}, stats, **options)
    return factors, prune_query_key(kernels, factors, width)


@pytest.mark.quick("True-False-False-1", "True-False-True-2", "False-True-True-2")
@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotary, select", [(True, False), (False, False), (False, True)])
def test_full_heads_give_the_same_logits(per_group, bias, rotary, select):
    x, kernels = qk_problem(per_group=per_group, bias=bias, rotary=rotary)
    positions = jnp.arange(len(x)) if rotary else None
    _, new = run_qk(x, kernels, 8, positions, select=select)
    for name in kernels:
        assert new[name].shape == kernels[name].shape
    if rotary or select:
        for name in kernels:
            np.testing.assert_array_equal(new[name], kernels[name])
    got, expected = (logits(x, k, positions) for k in (new, kernels))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("rotary", [True, False])
def test_groups_share_one_selection_and_biases_follow(rotary):
    x, kernels = qk_problem(rotary=rotary)
    positions = jnp.arange(len(x)) if rotary else None
    factors, new = run_qk(x, kernels, 4, positions, select=True)
    order = np.asarray(factors.parts["order"])
    for group in range(2):
        kept = np.sort(order[group, : 2 if rotary else 4])
        columns = np.concatenate([kept, kept + 4]) if rotary else kept
        for head in (2 * group, 2 * group + 1):
            np.testing.assert_array_equal(new["q"][:, head], kernels["q"][:, head][:, columns])
            np.testing.assert_array_equal(new["q_bias"][head], kernels["q_bias"][head, columns])
        np.testing.assert_array_equal(new["k"][:, group], kernels["k"][:, group][:, columns])
        np.testing.assert_array_equal(new["k_bias"][group], kernels["k_bias"][group, columns])
        if rotary:
            np.testing.assert_array_equal(new["rope_index"][group], kept)


def test_cr_scores_are_products_of_norms():
    """√(C_Q[ii] C_K[ii]) = ‖q_i‖‖k_i‖ = products of column norms of the eigh roots."""
    x, kernels = qk_problem(per_group=1, rotary=False)
    factors, _ = run_qk(x, kernels, 4, select=True)
    q, k = project(x, kernels, "q"), project(x, kernels, "k")
    expected = np.linalg.norm(q, axis=0) * np.linalg.norm(k, axis=0)  # [heads, d]
    np.testing.assert_array_equal(factors.parts["order"], np.argsort(-expected, axis=1))
    for head in range(2):
        roots = []
        for z in (q, k):
            values, vectors = np.linalg.eigh(z[:, head].T @ z[:, head])
            roots.append(vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T)
        np.testing.assert_allclose(
            np.linalg.norm(roots[0], axis=0) * np.linalg.norm(roots[1], axis=0), expected[head]
        )
    # Grouped queries count like one head's queries of more tokens.
    x, kernels = qk_problem(groups=1, per_group=3, rotary=False)
    factors, _ = run_qk(x, kernels, 4, select=True)
    q, k = project(x, kernels, "q"), project(x, kernels, "k")
    stacked = q.transpose(1, 0, 2).reshape(-1, 8)
    scores = np.linalg.norm(stacked, axis=0) * np.linalg.norm(k[:, 0], axis=0)
    np.testing.assert_array_equal(factors.parts["order"][0], np.argsort(-scores))


def test_cr_error_and_bounds():
    x, kernels = qk_problem(groups=1, per_group=1, rotary=False)
    q, k = project(x, kernels, "q")[:, 0], project(x, kernels, "k")[:, 0]
    factors, new = run_qk(x, kernels, 5, select=True)
    dropped = np.asarray(factors.parts["order"])[0, 5:]
    error = np.linalg.norm(logits(x, kernels) - logits(x, new))
    exact = (q.T @ q)[np.ix_(dropped, dropped)] * (k.T @ k)[np.ix_(dropped, dropped)]
    assert error**2 == pytest.approx(exact.sum())
    scores = np.linalg.norm(q, axis=0) * np.linalg.norm(k, axis=0)
    assert error <= scores[dropped].sum() <= 3 / 8 * scores.sum()
    tail = np.linalg.svd(q @ k.T, compute_uv=False)[5:]
    assert error >= np.linalg.norm(tail)


def test_cr_error_of_several_sequences():
    """Exact with the product taken per sequence; bounded by the scores of all tokens."""
    x, kernels = qk_problem(groups=1, per_group=1, rotary=False, tokens=90)
    factors, new = run_qk(x, kernels, 5, select=True)
    dropped = np.asarray(factors.parts["order"])[0, 5:]
    block = np.ix_(dropped, dropped)
    q, k = (project(x, kernels, name)[:, 0] for name in "qk")
    parts = np.split(np.arange(90), 3)
    m = sum((q[p].T @ q[p]) * (k[p].T @ k[p]) for p in parts)
    error = sum(np.sum((logits(x[p], kernels) - logits(x[p], new)) ** 2) for p in parts)
    assert error == pytest.approx(m[block].sum())
    assert error <= (len(x) * np.sqrt(np.asarray(factors.spectrum[5:]))).sum() ** 2


def test_cr_is_the_best_selection_of_orthogonal_columns():
    rng = np.random.default_rng(0)
    q, k = (np.linalg.qr(rng.normal(size=(40, 8)))[0] * rng.uniform(0.5, 2, 8) for _ in "qk")
    stats = {"queries": heads(q[:, None]), "keys": heads(k[:, None])}
    kernels = {"q": jnp.ones((3, 1, 8)), "k": jnp.ones((3, 1, 8))}
    order = np.asarray(query_key(kernels, stats, select=True).parts["order"])[0]

    def error(kept):
        return np.linalg.norm(q @ k.T - q[:, kept] @ k[:, kept].T)

    best = min(map(list, itertools.combinations(range(8), 3)), key=error)
    assert set(order[:3]) == set(best)


@pytest.mark.parametrize("bias", [False, True])
def test_without_rotation_the_directions_are_optimal(bias):
    x, kernels = qk_problem(groups=1, per_group=2, rotary=False, bias=bias)
    q, k = project(x, kernels, "q"), project(x, kernels, "k")[:, 0]
    product = q.transpose(1, 0, 2).reshape(-1, 8) @ k.T
    tail = np.linalg.svd(product, compute_uv=False)[3:]
    factors, new = run_qk(x, kernels, 3)
    assert np.linalg.norm(logits(x, kernels) - logits(x, new)) == pytest.approx(
        np.linalg.norm(tail), rel=1e-6
    )
    _, selected = run_qk(x, kernels, 3, select=True)
    worse = np.linalg.norm(logits(x, kernels) - logits(x, selected))
    assert worse > np.linalg.norm(tail) * 1.01
    share = float(factors.spectrum[3:].sum() / factors.spectrum.sum())
    assert share == pytest.approx((tail**2).sum() / (product**2).sum(), rel=1e-6)


def test_rotation_commutes_with_dropping_pairs_only():
    rng = np.random.default_rng(0)
    q, positions = jnp.asarray(rng.normal(size=(1, 20, 1, 8))), jnp.arange(20)[None]
    whole = rotate(q, positions, jnp.asarray(FREQUENCIES)[None], 1.0)
    pairs = np.array([0, 2])
    columns = np.concatenate([pairs, pairs + 4])
    narrow = rotate(q[..., columns], positions, jnp.asarray(FREQUENCIES[pairs])[None], 1.0)
    np.testing.assert_allclose(narrow, whole[..., columns], atol=1e-6)
    unpaired = np.array([0, 1, 2, 7])
    wrong = rotate(q[..., unpaired], positions, jnp.asarray(FREQUENCIES[[0, 1]])[None], 1.0)
    assert np.abs(np.asarray(wrong - whole[..., unpaired])).max() > 0.1


def test_pair_scores_are_the_same_before_and_after_the_rotation():
    x, kernels = qk_problem()
    before, _ = run_qk(x, kernels, 4)
    after, _ = run_qk(x, kernels, 4, jnp.arange(len(x)))
    np.testing.assert_array_equal(before.parts["order"], after.parts["order"])
    np.testing.assert_allclose(before.spectrum, after.spectrum, rtol=1e-5)

    def energy(name):  # [groups, pairs], summed over the query heads of a group
        z = project(x, kernels, name).reshape(len(x), 2, -1, 2, 4)
        return (z**2).sum((0, 2, 3)) / len(x)

    scores = energy("q") * energy("k")
    np.testing.assert_array_equal(before.parts["order"], np.argsort(-scores, axis=1))
    expected = -np.sort(-scores, axis=1).sum(0)
    np.testing.assert_allclose(np.asarray(before.spectrum).reshape(4, 2).sum(1), expected)
    # Biases count: large ones change what is kept.
    kernels["q_bias"] = kernels["q_bias"].copy()
    first = int(np.asarray(before.parts["order"])[0, -1])
    kernels["q_bias"][:2, first] += 1e3
    changed, _ = run_qk(x, kernels, 4)
    assert int(np.asarray(changed.parts["order"])[0, 0]) == first


def test_logits_depend_on_the_distance_only_after_compression():
    x, kernels = qk_problem()
    _, new = run_qk(x, kernels, 4)
    here, there = (logits(x, new, jnp.arange(60) + shift) for shift in (0, 37))
    np.testing.assert_allclose(here, there, atol=1e-3 * np.abs(here).max())


def test_gates_give_the_error_in_the_loss():
    """With a saliency the error of a set of pairs is half the quadratic form of its block."""
    x, kernels = qk_problem()
    effects = np.random.default_rng(3).normal(size=(200, 2, 4)) * [1, 5, 2, 3]
    stats = {
        "queries": heads(project(x, kernels, "q")),
        "keys": heads(project(x, kernels, "k")),
        "gates": heads(effects),
    }
    factors = query_key({n: jnp.asarray(a) for n, a in kernels.items()}, stats)
    order, fisher = np.asarray(factors.parts["order"]), np.asarray(stats["gates"].second_moment())
    exact = [
        sum(fisher[g][np.ix_(order[g, p:], order[g, p:])].sum() / 2 for g in range(2))
        for p in range(5)
    ]
    predicted = [float(factors.spectrum[2 * p :].sum()) for p in range(5)]
    assert (np.array(predicted) >= np.array(exact) - 1e-9).all()
    assert predicted[0] == pytest.approx(max(exact))
