"""Theorems of MoDeGPT's modules: identities at full width, optimality, exact errors, rotation."""

import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax import linalg
from lordjax.factoring import factor_program
from lordjax.methods import METHODS
from lordjax.methods.modular import (
    RIDGE,
    SHRINKAGE,
    mlp,
    narrow_mlp,
    narrow_query_key,
    narrow_value_output,
    query_key,
    value_output,
)
from lordjax.models.layers import rotate
from lordjax.stats import HeadMoments, Moments, SecondMoment

SCORES = ("leverage", "elimination", "energy", "random")


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def moments(x):
    return Moments.zeros(x.shape[1], jnp.float64).update(jnp.asarray(x))


def heads(x):
    """Moments of ``[tokens, heads, d]``."""
    return HeadMoments.zeros(x.shape[1:], jnp.float64).update(jnp.asarray(x.reshape(len(x), -1)))


def gradients(width, seed=9):
    g = np.random.default_rng(seed).normal(size=(50, width)) @ np.diag(np.arange(1.0, width + 1))
    return SecondMoment.zeros(width, jnp.float64).update(jnp.asarray(g))


def metric(stat):
    """The damped metric that the methods use."""
    m = np.asarray(stat.second_moment())
    return m + linalg.GRADIENT_DAMPING * np.trace(m) / len(m) * np.eye(len(m))


# --- mlp ------------------------------------------------------------------------------------------


def mlp_problem(tokens=500, inside=24, out=10, seed=0, mean=0.5):
    rng = np.random.default_rng(seed)
    mix = np.eye(inside) + rng.normal(size=(inside, inside)) / 6  # correlated, well conditioned
    z = rng.normal(size=(tokens, inside)) @ mix + mean
    kernels = {
        "gate": rng.normal(size=(out, inside)),
        "up": rng.normal(size=(out, inside)),
        "down": rng.normal(size=(inside, out)),
    }
    return z, kernels


def run_mlp(z, kernels, width, score="leverage", **options):
    stats = {"moments": moments(z), **options.pop("stats", {})}
    factors = mlp({n: jnp.asarray(a) for n, a in kernels.items()}, stats, score=score, **options)
    return factors, narrow_mlp(kernels, factors, width)


def mlp_error(z, kernels, factors, new, m=None):
    """Mean squared output error of the narrow MLP, in a metric."""
    order = np.asarray(factors.parts["order"])[: len(new["down"])]
    gap = z @ kernels["down"] - z[:, order] @ new["down"] - new.get("out_bias", 0)
    return np.einsum("ti,ij,tj->", gap, np.eye(gap.shape[1]) if m is None else m, gap) / len(z)


@pytest.mark.parametrize("score", SCORES)
def test_all_neurons_give_the_same_mlp(score):
    z, kernels = mlp_problem()
    factors, new = run_mlp(z, kernels, 24, score)
    order = np.asarray(factors.parts["order"])
    assert sorted(order) == list(range(24))
    for name in ("gate", "up"):
        np.testing.assert_array_equal(new[name], kernels[name][:, order])
    np.testing.assert_allclose(new["down"], kernels["down"][order], rtol=0, atol=1e-8)
    assert factors.spectrum.shape == (24,)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("weighted", [False, True])
def test_refit_is_least_squares_and_its_error_is_known_for_every_width(score, weighted):
    z, kernels = mlp_problem()
    stat = gradients(10)
    extra = {"stats": {"gradients": stat}} if weighted else {}
    m = metric(stat) if weighted else np.eye(10)
    for width in (1, 7, 16, 23):
        factors, new = run_mlp(z, kernels, width, score, **extra)
        kept = z[:, np.asarray(factors.parts["order"])[:width]]
        target = z @ kernels["down"]
        best = np.linalg.lstsq(kept, target, rcond=None)[0]
        np.testing.assert_allclose(new["down"], best, atol=1e-4 * np.abs(best).max())
        gap = target - kept @ new["down"]
        assert np.abs(kept.T @ gap).max() < 1e-3 * np.abs(kept.T @ target).max()
        error = mlp_error(z, kernels, factors, new, m)
        assert error == pytest.approx(float(factors.spectrum[width:].sum()), rel=1e-3)
        # No pair of that inner width does better than the singular values' tail (Eckart-Young).
        tail = np.linalg.svd(target @ np.linalg.cholesky(m), compute_uv=False)[width:]
        assert error >= (tail**2).sum() / len(z) * (1 - 1e-9)
    assert (np.asarray(factors.spectrum) >= 0).all()


def test_without_jitter_refit_and_error_are_exact(monkeypatch):
    monkeypatch.setattr(linalg, "JITTER", 1e-15)  # 0 would never grow after a failure
    z, kernels = mlp_problem()
    w, c = kernels["down"], z.T @ z / len(z)
    for width in (7, 16):
        factors, new = run_mlp(z, kernels, width)
        order = np.asarray(factors.parts["order"])
        s, d = order[:width], order[width:]
        best = np.linalg.lstsq(z[:, s], z @ w, rcond=None)[0]
        np.testing.assert_allclose(new["down"], best, rtol=0, atol=1e-8 * np.abs(best).max())
        inner = np.linalg.solve(c[np.ix_(s, s)], c[np.ix_(s, d)])
        trace = np.trace(w[d].T @ (c[np.ix_(d, d)] - c[np.ix_(d, s)] @ inner) @ w[d])
        assert mlp_error(z, kernels, factors, new) == pytest.approx(trace, rel=1e-8)
        assert float(factors.spectrum[width:].sum()) == pytest.approx(trace, rel=1e-8)


def test_shrinking_is_a_ridge_on_every_neuron_by_its_own_energy():
    z, kernels = mlp_problem(tokens=60)
    factors, new = run_mlp(z, kernels, 9, "elimination", shrinkage=0.5)
    order = np.asarray(factors.parts["order"])
    c = z.T @ z / len(z)
    c += 0.5 * 24 / 60 * np.diag(np.diag(c))
    s, down = order[:9], kernels["down"]
    expected = np.linalg.solve(c[np.ix_(s, s)], c[s] @ down)
    np.testing.assert_allclose(new["down"], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    # The predicted error is that of correlations that are shrunk, energies as they are.
    gap = down - np.eye(24)[:, s] @ expected
    error = np.trace(gap.T @ c @ gap) / (1 + 0.5 * 24 / 60)
    assert float(factors.spectrum[9:].sum()) == pytest.approx(error, rel=1e-4)
    # Neurons in other units: the same function of the same inputs.
    units = np.logspace(-2, 2, 24)
    scaled = kernels | {"down": down / units[:, None]}
    again, other = run_mlp(z * units, scaled, 9, "elimination", shrinkage=0.5)
    np.testing.assert_array_equal(again.parts["order"], order)
    np.testing.assert_allclose(other["down"] * units[s, None], expected, rtol=0, atol=0.01)


def test_shrinking_does_better_on_tokens_that_were_not_seen():
    errors = np.zeros((8, 2))
    for seed in range(8):
        z, kernels = mlp_problem(tokens=1024, seed=seed)
        few, fresh = z[:24], z[24:]
        for i, share in enumerate((0.0, SHRINKAGE)):
            result = run_mlp(few, kernels, 12, "elimination", shrinkage=share)
            errors[seed, i] = mlp_error(fresh, kernels, *result)
    assert (errors[:, 1] < errors[:, 0]).all()


def test_units_of_what_is_added_to_energies():
    energies = np.array([4.0, 0.0, 2.0])
    assert linalg.mean_unit(energies) == 2
    np.testing.assert_allclose(linalg.own_unit(energies), energies, atol=1e-5)
    assert (linalg.own_unit(energies) > 0).all()
    for unit in (linalg.mean_unit, linalg.own_unit):
        assert (unit(np.zeros(3)) > 0).all()  # a matrix of zeros has a factor, too
        np.testing.assert_allclose(unit(jnp.asarray(energies)), unit(energies))


def test_with_shrinking_rounding_does_not_choose_the_neurons():
    """Of fewer tokens than neurons, where a factor of the sums as they are works by luck."""
    z, kernels = mlp_problem(tokens=16)
    exact, down = moments(z), {"down": jnp.asarray(kernels["down"])}

    def found(shrinkage):
        orders, curves = set(), []
        for seed in range(8):
            e = np.random.default_rng(seed).normal(size=exact.scatter.shape)
            rounded = exact.replace(scatter=exact.scatter * (1 + 1e-7 * (e + e.T) / 2))
            factors = mlp(down, {"moments": rounded}, score="elimination", shrinkage=shrinkage)
            orders.add(tuple(factors.parts["order"].tolist()))
            curves.append(np.asarray(factors.spectrum))
        return len(orders), np.ptp(curves, axis=0).max() / curves[0].max()

    assert found(0.0)[0] > 1
    orders, spread = found(SHRINKAGE)
    assert orders == 1
    assert spread < 1e-5


def test_nystroem_bound():
    z, kernels = mlp_problem()
    factors, new = run_mlp(z, kernels, 12)
    order = np.asarray(factors.parts["order"])
    c = z.T @ z / len(z)
    s, dropped = order[:12], order[12:]
    schur = c[np.ix_(dropped, dropped)] - c[np.ix_(dropped, s)] @ np.linalg.solve(
        c[np.ix_(s, s)], c[np.ix_(s, dropped)]
    )
    bound = np.linalg.norm(kernels["down"], 2) ** 2 * np.trace(schur)
    assert mlp_error(z, kernels, factors, new) <= bound * (1 + 1e-6)


def test_leverage_scores():
    z, _ = mlp_problem()
    c = z.T @ z / len(z)
    lam = 1e-2 * np.mean(np.diag(c))
    scores = 1 - lam * np.asarray(linalg.leverage_complement(jnp.asarray(c), 1e-2))
    expected = np.diag(c @ np.linalg.inv(c + lam * np.eye(len(c))))
    np.testing.assert_allclose(scores, expected, atol=1e-10)
    assert ((scores >= 0) & (scores < 1)).all()
    values = np.linalg.eigvalsh(c)
    assert scores.sum() == pytest.approx((values / (values + lam)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_refit_is_never_worse_than_slicing_nor_an_intercept_than_the_refit(seed):
    z, kernels = mlp_problem(seed=seed, mean=2.0)
    for width in (4, 12, 20):
        errors = []
        for options in ({"intercept": True}, {}, {"fit": False}):  # random: the same neurons
            factors, new = run_mlp(z, kernels, width, "random", **options)
            errors.append(mlp_error(z, kernels, factors, new))
            if options.get("intercept"):
                predicted = float(factors.spectrum[width:].sum())
        assert errors[0] <= errors[1] * (1 + 1e-6)
        assert errors[1] <= errors[2] * (1 + 1e-6)
        assert errors[0] == pytest.approx(predicted, rel=1e-3)


def test_without_a_mean_an_intercept_changes_nothing():
    z, kernels = mlp_problem(mean=2.0)
    centred = z - z.mean(0)
    plain, with_bias = (
        run_mlp(centred, kernels, 10, "leverage", intercept=i)[1] for i in (False, True)
    )
    np.testing.assert_allclose(with_bias["down"], plain["down"], atol=1e-8)
    np.testing.assert_allclose(with_bias["out_bias"], 0, atol=1e-9)


def test_error_of_slicing_is_exact_at_the_widths_it_offers():
    z, kernels = mlp_problem()
    factors, _ = run_mlp(z, kernels, 12, "energy", fit=False)
    order = np.asarray(factors.parts["order"])
    exact = [
        mlp_error(z, kernels, factors, {"down": kernels["down"][order[:k]]}) for k in range(25)
    ]
    predicted = np.append(np.cumsum(np.asarray(factors.spectrum)[::-1])[::-1], 0)
    # Where dropping more happens to do better, the prediction is the envelope.
    np.testing.assert_allclose(
        predicted, np.maximum.accumulate(exact[::-1])[::-1], rtol=1e-8, atol=1e-9
    )


@pytest.mark.parametrize("score", ["leverage", "elimination"])
def test_a_duplicate_costs_nothing_and_the_dead_go_first(score):
    z, kernels = mlp_problem()
    z[:, 5] = z[:, 3]
    z[:, 8] = 0
    factors, _ = run_mlp(z, kernels, 22, score)
    order = list(np.asarray(factors.parts["order"]))
    assert order[-1] == 8
    assert float(factors.spectrum[-1]) == pytest.approx(0, abs=1e-4)
    assert len({3, 5} & set(order[:22])) >= 1
    assert float(factors.spectrum[22:].sum()) < 1e-4 * float(factors.spectrum.sum())
    assert np.isfinite(narrow_mlp(kernels, factors, 24 - 1)["down"]).all()


@pytest.mark.parametrize("n", [1, 256, 257, 700])
def test_a_triangle_is_inverted_by_halves(n):
    lower = np.tril(np.random.default_rng(n).normal(size=(n, n))) / np.sqrt(n) + 2 * np.eye(n)
    inverse = np.asarray(linalg.lower_inverse(jnp.asarray(lower)))
    assert not np.triu(inverse, 1).any()
    np.testing.assert_allclose(inverse @ lower, np.eye(n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("unit", [linalg.mean_unit, linalg.own_unit])
def test_jitter_is_the_least_share_that_works(unit):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    a = (basis * np.append(np.ones(11), -5e-5)) @ basis.T  # 1e-4 of the mean is the first above
    for first, share in ((1e-6, 1e-4), (1e-3, 1e-3)):
        lower = np.asarray(linalg.jittered(jnp.asarray(a), first, unit(np.diag(a))))
        shift = share * np.diag(unit(np.diag(a)) * np.ones(12))
        np.testing.assert_allclose(lower @ lower.T, a + shift, rtol=0, atol=1e-12)
    broken = linalg.jittered(jnp.asarray(a).at[3, 3].set(jnp.nan), 1e-6, unit(np.diag(a)))
    assert not np.isfinite(broken).all()


def test_duplicates_have_equal_scores():
    z, _ = mlp_problem()
    z[:, 5], z[:, 8] = z[:, 3], 0
    c = z.T @ z / len(z)
    h = np.asarray(linalg.leverage_complement(jnp.asarray(c), RIDGE))
    scores = 1 - RIDGE * np.diag(c).mean() * h
    assert scores[3] == pytest.approx(scores[5], rel=1e-6)
    assert scores[3] < np.delete(scores, [3, 5, 8]).min()
    assert np.isinf(h[8])


def test_an_mlp_without_a_gate():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 10))
    kernels = {"up": rng.normal(size=(10, 24)), "up_bias": rng.normal(size=24)}
    kernels["down"] = rng.normal(size=(24, 10))
    z = np.maximum(x @ kernels["up"] + kernels["up_bias"], 0)
    factors, new = run_mlp(z, kernels, 16)
    assert set(new) == set(kernels)
    narrow = np.maximum(x @ new["up"] + new["up_bias"], 0) @ new["down"]
    error = np.mean(np.sum((z @ kernels["down"] - narrow) ** 2, axis=1))
    assert error == pytest.approx(float(factors.spectrum[16:].sum()), rel=1e-3)


@pytest.mark.parametrize("score", SCORES)
def test_fewer_tokens_than_neurons(score):
    z, kernels = mlp_problem(tokens=9)
    factors, new = run_mlp(z, kernels, 12, score)
    assert np.isfinite(new["down"]).all()
    scale = np.mean((z @ kernels["down"]) ** 2)
    assert mlp_error(z, kernels, factors, new) < 1e-2 * scale * 10


def test_order_does_not_depend_on_scale_and_follows_a_permutation():
    z, kernels = mlp_problem()
    swap = np.random.default_rng(1).permutation(24)
    for score in ("leverage", "elimination"):
        plain, new = run_mlp(z, kernels, 11, score)
        scaled, same = run_mlp(100 * z, kernels, 11, score)
        np.testing.assert_array_equal(plain.parts["order"], scaled.parts["order"])
        np.testing.assert_allclose(same["down"], new["down"], rtol=1e-6)
        moved, _ = run_mlp(z[:, swap], kernels | {"down": kernels["down"][swap]}, 11, score)
        assert set(swap[np.asarray(moved.parts["order"])[:11]]) == set(
            np.asarray(plain.parts["order"])[:11]
        )


def test_elimination_removes_what_the_output_misses_least():
    """One at a time it is the exact greedy choice, and no worse than leverage on average."""
    z, kernels = mlp_problem(inside=12)
    c, w = z.T @ z / len(z), kernels["down"]

    def error(kept):
        best = np.linalg.lstsq(z[:, kept], z @ w, rcond=None)[0]
        return ((z @ w - z[:, kept] @ best) ** 2).sum()

    order = np.asarray(linalg.elimination_order(jnp.asarray(c), jnp.asarray(w), block=1))
    alive = list(range(12))
    for dropped in order[:3:-1]:
        cheapest = min(alive, key=lambda i: error([j for j in alive if j != i]))
        assert dropped == cheapest
        alive.remove(dropped)
    # In blocks, one of two columns that replace each other stays, whatever they weigh.
    z, kernels = mlp_problem(inside=70, tokens=900)
    z[:, 5] = z[:, 3]
    kernels["down"][[3, 5]] *= 30
    factors, _ = run_mlp(z, kernels, 35, "elimination")
    kept = set(np.asarray(factors.parts["order"])[:35].tolist())
    assert len({3, 5} & kept) == 1
    assert sorted(np.asarray(factors.parts["order"])) == list(range(70))
    totals = {"leverage": 0.0, "elimination": 0.0}
    for seed, name in itertools.product(range(4), totals):
        z, kernels = mlp_problem(seed=seed, inside=48)
        factors, _ = run_mlp(z, kernels, 20, name)
        totals[name] += float(factors.spectrum[20:].sum())
    assert totals["elimination"] < totals["leverage"]


# --- qk -------------------------------------------------------------------------------------------


def qk_problem(groups=2, per_group=2, width=8, tokens=60, seed=0, model=12, rotary=True, bias=True):
    rng = np.random.default_rng(seed)
    h = groups * per_group
    scales = np.exp(rng.normal(size=width))
    kernels = {
        "q": rng.normal(size=(model, h, width)) * scales,
        "k": rng.normal(size=(model, groups, width)) * scales,
    }
    if bias:
        kernels["q_bias"] = rng.normal(size=(h, width))
        kernels["k_bias"] = rng.normal(size=(groups, width))
    if rotary:
        kernels["rope_index"] = np.tile(np.arange(width // 2, dtype=np.int32), (groups, 1))
    x = rng.normal(size=(tokens, model))
    return x, kernels


FREQUENCIES = (10_000.0 ** -(np.arange(4) / 4)).astype(np.float32)


def project(x, kernels, name, positions=None, turns=FREQUENCIES):
    """``[tokens, heads, d]`` with bias, rotated if positions are given."""
    y = np.einsum("tm,mhd->thd", x, kernels[name]) + kernels.get(f"{name}_bias", 0)
    if positions is None:
        return y
    index = kernels["rope_index"]
    freq = np.repeat(turns[index], y.shape[1] // len(index), axis=0)
    return np.asarray(rotate(jnp.asarray(y)[None], positions[None], jnp.asarray(freq), 1.0)[0])


def logits(x, kernels, positions=None):
    """``[h, s, t]``, unscaled."""
    q, k = (project(x, kernels, name, positions) for name in "qk")
    return np.einsum("shd,thd->hst", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1))


def run_qk(x, kernels, width, positions=None, **options):
    stats = {
        "queries": heads(project(x, kernels, "q", positions)),
        "keys": heads(project(x, kernels, "k", positions)),
    }
    factors = query_key({n: jnp.asarray(a) for n, a in kernels.items()}, stats, **options)
    return factors, narrow_query_key(kernels, factors, width)


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
    """With gates the error of a set of pairs is half the quadratic form of its block."""
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


# --- vo -------------------------------------------------------------------------------------------


def vo_problem(groups=2, per_group=2, width=6, model=16, length=40, seed=0, bias=True):
    """Kernels, inputs ``[s, m]`` and causal attention probabilities ``[h, s, s]``."""
    rng = np.random.default_rng(seed)
    h = groups * per_group
    scores = rng.normal(size=(h, length, length)) + np.where(np.tri(length), 0, -np.inf)
    probabilities = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    kernels = {
        "v": rng.normal(size=(model, groups, width)) * np.exp(rng.normal(size=width)),
        "o": rng.normal(size=(h, width, model)),
    }
    if bias:
        kernels["v_bias"] = rng.normal(size=(groups, width))
    return kernels, rng.normal(size=(length, model)), probabilities


def mixed(kernels, x, probabilities):
    """``[s, h, d]``: attention times values."""
    v = np.einsum("tm,mkd->tkd", x, kernels["v"]) + kernels.get("v_bias", 0)
    return np.einsum(
        "hst,thd->shd", probabilities, np.repeat(v, len(probabilities) // v.shape[1], 1)
    )


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
    return factors, narrow_value_output(kernels, factors, width)


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
    """Neither a thousand random ones nor those that alternating least squares polishes."""
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
    """``C^½`` and its pseudo-inverse."""
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
    gap = vo_output(*problem) - vo_output(narrow_value_output(problem[0], factors, 3), *problem[1:])
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
        new = narrow_value_output(kernels, factors, width)
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


# --- all ------------------------------------------------------------------------------------------


def problems():
    """Kind of module -> its kernels, and every statistic that a method may ask for."""
    z, mlp_kernels = mlp_problem()
    x, qk_kernels = qk_problem()
    vo_kernels, vx, probabilities = vo_problem()
    values = mixed(vo_kernels, vx, probabilities)
    return {
        "mlp": (mlp_kernels, {"moments": moments(z), "gradients": gradients(10)}),
        "qk": (
            qk_kernels,
            {
                "queries": heads(project(x, qk_kernels, "q")),
                "keys": heads(project(x, qk_kernels, "k")),
                "gates": heads(np.ones((5, 2, 4))),
            },
        ),
        "vo": (
            vo_kernels,
            {
                "moments": moments(values.reshape(len(values), -1)),
                "values": heads(np.einsum("tm,mkd->tkd", vx, vo_kernels["v"])),
                "gradients": gradients(16),
            },
        ),
    }


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


def test_gate_and_up_are_not_moved_to_the_device_to_factor_an_mlp():
    z, kernels = mlp_problem()
    single = {n: a.astype(np.float32) for n, a in kernels.items()}
    lowered = factor_program("modegpt-published", "mlp").lower(single, {"moments": moments(z)})
    shapes = {name: "x".join(map(str, a.shape)) for name, a in single.items()}
    assert f"tensor<{shapes['down']}xf32>" in lowered.as_text()
    assert f"tensor<{shapes['up']}xf32>" not in lowered.as_text()


def test_refits_read_only_their_own_triangle_and_solve_it_in_double_precision():
    z, kernels = mlp_problem()
    c, w = z.T @ z / len(z), kernels["down"]
    lower, right = (np.asarray(a, np.float32) for a in linalg.nested_refit(c, w))
    for k in (1, 9, 24):
        behind = lower.copy(), right.copy()
        behind[0][k:], behind[1][k:] = np.nan, np.nan
        found = linalg.refit(*behind, k)
        assert found.shape == (k, 10)
        residual = lower[:k, :k].astype(float).T @ found - right[:k]
        assert np.abs(residual).max() < 1e-12 * np.abs(right[:k]).max()


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
    new = narrow_value_output(arrays, factors, 64)
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
