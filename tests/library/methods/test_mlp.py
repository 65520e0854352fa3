"""Theorems of pruned MLPs: identities at full width, least squares, exact errors."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from problems import gradients, metric, mlp_problem, moments

from lordjax.compression.site_factors import factor_program
from lordjax.methods import column_selection, linalg
from lordjax.methods.modular.mlp import RIDGE, SHRINKAGE, mlp, prune_mlp

pytestmark = pytest.mark.usefixtures("double")


SCORES = ("leverage", "elimination", "energy", "random")


def run_mlp(z, kernels, width, score="leverage", **options):
    stats = {"moments": moments(z), **options.pop("stats", {})}
    factors = mlp({n: jnp.asarray(a) for n, a in kernels.items()}, stats, score=score, **options)
    return factors, prune_mlp(kernels, factors, width)


def mlp_error(z, kernels, factors, new, m=None):
    """Returns the mean squared output error of the pruned MLP, in a metric."""
    order = np.asarray(factors.parts["order"])[: len(new["down"])]
    gap = z @ kernels["down"] - z[:, order] @ new["down"] - new.get("out_bias", 0)
    return np.einsum("ti,ij,tj->", gap, np.eye(gap.shape[1]) if m is None else m, gap) / len(z)


@pytest.mark.quick("elimination")
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


@pytest.mark.quick("True-elimination")
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
    monkeypatch.setattr(column_selection, "JITTER", 1e-15)  # 0 would never grow after a failure
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


@pytest.mark.full
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


@pytest.mark.full
def test_with_shrinking_rounding_does_not_choose_the_neurons():
    """Fewer tokens than neurons: an undamped Cholesky factor would succeed only by luck."""
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
    scores = 1 - lam * np.asarray(column_selection.leverage_complement(jnp.asarray(c), 1e-2))
    expected = np.diag(c @ np.linalg.inv(c + lam * np.eye(len(c))))
    np.testing.assert_allclose(scores, expected, atol=1e-10)
    assert ((scores >= 0) & (scores < 1)).all()
    values = np.linalg.eigvalsh(c)
    assert scores.sum() == pytest.approx((values / (values + lam)).sum())


@pytest.mark.full
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
    assert np.isfinite(prune_mlp(kernels, factors, 24 - 1)["down"]).all()


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
    h = np.asarray(column_selection.leverage_complement(jnp.asarray(c), RIDGE))
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


@pytest.mark.full
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


@pytest.mark.full
def test_elimination_removes_what_the_output_misses_least():
    """With blocks of 1 it is the exact greedy choice, and no worse than leverage on average."""
    z, kernels = mlp_problem(inside=12)
    c, w = z.T @ z / len(z), kernels["down"]

    def error(kept):
        best = np.linalg.lstsq(z[:, kept], z @ w, rcond=None)[0]
        return ((z @ w - z[:, kept] @ best) ** 2).sum()

    order = np.asarray(column_selection.elimination_order(jnp.asarray(c), jnp.asarray(w), block=1))
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
    lower, right = (np.asarray(a, np.float32) for a in column_selection.nested_refit(c, w))
    for k in (1, 9, 24):
        behind = lower.copy(), right.copy()
        behind[0][k:], behind[1][k:] = np.nan, np.nan
        found = column_selection.refit(*behind, k)
        assert found.shape == (k, 10)
        residual = lower[:k, :k].astype(float).T @ found - right[:k]
        assert np.abs(residual).max() < 1e-12 * np.abs(right[:k]).max()
