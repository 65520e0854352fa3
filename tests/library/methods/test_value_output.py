"""Theorems of value and output heads: identities at full width, optimality, exact errors."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    gradients,
    heads,
    metric,
    mixed,
    moments,
    vo_problem,
)

from lordjax.calibration.statistics import HeadMoments
from lordjax.methods.modular.value_output import prune_value_output, value_output

pytestmark = pytest.mark.usefixtures("double")


def vo_output(kernels, x, probabilities):
    out = np.einsum("shd,hdm->sm", mixed(kernels, x, probabilities), kernels["o"])
    return out + kernels.get("out_bias", 0)


def run_vo(kernels, x, probabilities, width, *, fit, context=True, stats=()):
    if context or fit:
        z = mixed(kernels, x, probabilities)
        found = {"moments": moments(z.reshape(len(z), -1))}
    else:
        found = {"values": heads(np.einsum("tm,mkd->tkd", x, kernels["v"]))}
    arrays = {n: jnp.asarray(a) for n, a in kernels.items()}
    factors = value_output(arrays, found | dict(stats), fit=fit)
    return factors, prune_value_output(kernels, factors, width)


@pytest.mark.quick("True-True-2", "False-True-2", "False-False-2")
@pytest.mark.parametrize("per_group", [1, 2])
@pytest.mark.parametrize("fit, context", [(True, True), (False, True), (False, False)])
def test_full_values_give_the_same_output(per_group, fit, context):
    problem = vo_problem(per_group=per_group, length=200)
    _, new = run_vo(*problem, 6, fit=fit, context=context)
    expected = vo_output(*problem)
    got = vo_output(new, *problem[1:])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert (new["v_bias"] == 0).all()

    def products(k):
        v = np.repeat(k["v"], len(k["o"]) // k["v"].shape[1], axis=1)
        return np.einsum("mhd,hdn->hmn", v, k["o"])

    whole = products(problem[0])
    np.testing.assert_allclose(products(new), whole, rtol=0, atol=1e-8 * np.abs(whole).max())


def test_head_sized_form_is_the_published_one():
    """For one head: the product and the error of two SVDs through C_X^½, to 1e-9."""
    kernels, x, probabilities = vo_problem(groups=1, per_group=1, bias=False)
    factors, new = run_vo(kernels, x, probabilities, 3, fit=False, context=False)
    c = x.T @ x / len(x)
    v, o = kernels["v"][:, 0], kernels["o"][0]
    root, inverse = roots(c)
    expected = published_vo(root, inverse, v, o, 3)
    np.testing.assert_allclose(new["v"][:, 0] @ new["o"][0], expected, atol=1e-9)
    singular = np.linalg.svd(root @ v @ o, compute_uv=False)
    assert float(factors.spectrum[3:].sum()) == pytest.approx((singular[3:] ** 2).sum())


def test_no_pair_of_values_and_outputs_is_better():
    """No solution is better: neither random ones nor those of alternating least squares."""
    kernels, x, probabilities = vo_problem(groups=1, per_group=1, bias=False)
    factors, _ = run_vo(kernels, x, probabilities, 3, fit=False, context=False)
    target = x @ kernels["v"][:, 0] @ kernels["o"][0] / np.sqrt(len(x))
    best, reached = float(factors.spectrum[3:].sum()), np.inf
    rng = np.random.default_rng(1)
    for i in range(1000):
        right = rng.normal(size=(3, 16))
        for _ in range(40 if i % 50 == 0 else 1):
            left = target @ np.linalg.pinv(right)
            right = np.linalg.pinv(left) @ target
        error = np.sum((target - left @ right) ** 2)
        assert error >= best * (1 - 1e-9)
        reached = min(reached, error)
    assert reached == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("rank", [9, 4])  # 4: fewer than the head is wide
def test_head_sized_form_with_inputs_in_a_subspace(rank):
    kernels, _, probabilities = vo_problem(groups=1, per_group=1, bias=False)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, rank)) @ rng.normal(size=(rank, 16))
    _, new = run_vo(kernels, x, probabilities, 3, fit=False, context=False)
    pair = kernels["v"][:, 0], kernels["o"][0]
    expected = x @ published_vo(*roots(x.T @ x / len(x)), *pair, 3)
    got = x @ new["v"][:, 0] @ new["o"][0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def roots(c):
    """Returns ``C^½`` and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(c)
    there = values > 1e-12 * values[-1]
    root = vectors * np.sqrt(np.where(there, values, 0)) @ vectors.T
    return root, vectors * np.where(there, 1 / np.sqrt(np.where(there, values, 1)), 0) @ vectors.T


def published_vo(root, inverse, v, o, rank):
    """MoDeGPT's Algorithm 3 for one head, in float64."""
    u, sigma, vt = np.linalg.svd(root @ v, full_matrices=False)
    inner, kept, right = np.linalg.svd(sigma[:, None] * vt @ o, full_matrices=False)
    return (inverse @ u @ inner[:, :rank]) @ (kept[:rank, None] * right[:rank])


def test_the_gauge_of_values_does_not_matter():
    kernels, x, probabilities = vo_problem(groups=1, per_group=1, bias=False)
    turn = np.random.default_rng(2).normal(size=(6, 6))
    turned = {
        "v": kernels["v"] @ turn,
        "o": np.linalg.inv(turn) @ kernels["o"],
    }
    products = []
    for k in (kernels, turned):
        _, new = run_vo(k, x, probabilities, 3, fit=False, context=False)
        products.append(new["v"][:, 0] @ new["o"][0])
    np.testing.assert_allclose(*products, atol=1e-8)


def test_a_group_decided_jointly_beats_its_values_alone():
    kernels, x, probabilities = vo_problem(groups=1, per_group=3, bias=False)
    factors, _ = run_vo(kernels, x, probabilities, 3, fit=False, context=False)
    c = np.einsum("tm,mkd->tkd", x, kernels["v"])[:, 0]
    c = c.T @ c / len(x)
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(values) @ vectors.T
    top = np.linalg.eigh(c)[1][:, ::-1][:, :3]  # directions of most value energy, outputs ignored
    project_on = root @ (np.eye(6) - top @ top.T)
    alone = sum(np.linalg.norm(project_on @ o) ** 2 for o in kernels["o"])
    assert float(factors.spectrum[3:].sum()) < alone


def test_the_output_metric_and_the_fit_each_lower_the_true_error():
    problem = vo_problem(length=300)
    expected, errors = vo_output(*problem), []
    for options in ({"fit": False, "context": False}, {"fit": False}, {"fit": True}):
        factors, new = run_vo(*problem, 3, **options)
        errors.append(np.mean((expected - vo_output(new, *problem[1:])) ** 2))
    assert errors[2] < errors[1] < errors[0]
    # What is predicted for the fit is what happens, summed over outputs.
    assert float(factors.spectrum[3:].sum()) == pytest.approx(errors[2] * 16, rel=1e-3)


def test_value_error_in_the_metric_is_known():
    problem = vo_problem(length=300)
    stats = {"gradients": gradients(16)}
    factors, _ = run_vo(*problem, 3, fit=True, stats=stats.items())
    m = metric(stats["gradients"])
    gap = vo_output(*problem) - vo_output(prune_value_output(problem[0], factors, 3), *problem[1:])
    assert np.einsum("ti,ij,tj->", gap, m, gap) / len(gap) == pytest.approx(
        float(factors.spectrum[3:].sum()), rel=1e-3
    )


@pytest.mark.parametrize("fit", [False, True])
def test_value_error_is_zero_from_the_rank_of_the_product_on(fit):
    kernels, x, probabilities = vo_problem(groups=1, bias=False, length=200)
    rng = np.random.default_rng(5)
    kernels["v"] = kernels["v"] @ rng.normal(size=(6, 4)) @ rng.normal(size=(4, 6))
    expected = vo_output(kernels, x, probabilities)
    factors, _ = run_vo(kernels, x, probabilities, 4, fit=fit)
    errors = []
    for width in range(1, 7):
        new = prune_value_output(kernels, factors, width)
        errors.append(np.mean((expected - vo_output(new, x, probabilities)) ** 2))
    assert max(errors[3:]) < 1e-8 * errors[0]
    assert float(factors.spectrum[4:].sum()) < 1e-8 * float(factors.spectrum.sum())
    if fit:  # without, errors of different heads may cancel at one width
        assert (np.diff(errors[:4]) < 0).all()


def test_dead_value_directions_are_harmless():
    kernels, x, probabilities = vo_problem(bias=False)
    kernels["v"][:, :, 2] = 0
    for fit in (True, False):
        _, new = run_vo(kernels, x, probabilities, 5, fit=fit)
        assert np.isfinite(new["o"]).all()
        np.testing.assert_allclose(
            vo_output(new, x, probabilities), vo_output(kernels, x, probabilities), atol=1e-3
        )


@pytest.mark.slow
def test_head_sized_form_is_ten_times_faster_at_llama_shapes():
    """LLaMA-2-7B: width 4096, 32 heads of 128; both forms for all heads, in one run."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4200, 4096))
    v, o = rng.normal(size=(4096, 32, 128)) / 64, rng.normal(size=(32, 128, 4096)) / 64
    c = x.T @ x / len(x)
    head_sized = np.einsum("mkd,mke->kde", v, np.einsum("mn,nkd->mkd", c, v))
    stats = {"values": HeadMoments(jnp.asarray(1.0), jnp.asarray(head_sized))}
    arrays = {"v": jnp.asarray(v), "o": jnp.asarray(o)}
    factor = jax.jit(functools.partial(value_output, fit=False))
    factor(arrays, stats)
    start = time.perf_counter()
    factors = jax.block_until_ready(factor(arrays, stats))
    ours = time.perf_counter() - start
    new = prune_value_output(arrays, factors, 64)
    start = time.perf_counter()
    root_and_inverse = roots(c)  # theirs, too, needs to be found only once
    for head in range(32):
        product = published_vo(*root_and_inverse, v[:, head], o[head], 64)
        if head == 0:
            expected = product
    published = time.perf_counter() - start
    for head, want in ((0, expected), (31, product)):
        np.testing.assert_allclose(new["v"][:, head] @ new["o"][head], want, atol=1e-9)
    assert ours * 10 < published
