"""Theorems of the low-rank methods: optimality, identities; the example of theory/lord_rom §9."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lordjax.allocation.plan import SiteSize
from lordjax.calibration.statistics import AbsMean, Moments
from lordjax.compression.sequential import _regress
from lordjax.methods import METHODS, linalg, truncate
from lordjax.methods.low_rank import LOW_RANK_METHODS


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


# The worked example of theory/lord_rom §9, exact. W is [out, in], columns of X are tokens.
W = np.array([[2, -1, 0], [0, 3, 1], [1, 1, -2], [-1, 0, 2]], float)
X = np.array([[3, 1, 2, 4, 0, 2], [1, 0, 2, -1, 3, 1], [0, 2, 1, 1, -1, 3]], float)
B = np.array([0.5, -1, 0.25, 2])


def moments(x):
    """Returns the moments of tokens ``[n, d]``."""
    return Moments.zeros(x.shape[1], jnp.float64).update(jnp.asarray(x, jnp.float64))


def run(method, kernel, x, rank, *, side="input", gradients=None, target_mean=None):
    """Returns a method's kernel matrix and bias correction at a rank, and its factors."""
    kernel, x = jnp.asarray(kernel, jnp.float64), jnp.asarray(x, jnp.float64)
    stats = {side: moments(x if side == "input" else x @ kernel)}
    stats["abs_mean"] = AbsMean.zeros(x.shape[1], jnp.float64).update(x)
    stats["row_fisher"] = jnp.ones(x.shape[1])
    width = min(kernel.shape)
    stats["gradients"] = moments(jnp.eye(width) if gradients is None else gradients)
    if target_mean is not None:
        stats["target_mean"] = target_mean
    factors = METHODS[method].factor(kernel, stats)
    low_rank, bias = truncate(factors, rank)
    return np.asarray(low_rank.materialize()), bias, factors


def error(kernel, new, x, bias=None):
    """Returns the squared output error, summed over tokens."""
    gap = x @ kernel - x @ new
    return float(((gap - (0 if bias is None else np.asarray(bias))) ** 2).sum())


def problem(shape, tokens=200, seed=0, mean=0.0):
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(size=shape[0]))
    x = rng.normal(size=(tokens, shape[0])) @ rng.normal(size=(shape[0],) * 2) * scales + mean
    return rng.normal(size=shape), x


SHAPES = [(40, 25), (25, 60), (50, 50)]


@pytest.mark.parametrize(
    "method, errors",
    [
        ("lord-linear", (221.883709, 90.799034)),
        ("svd-llm", (221.883709, 90.799034)),
        ("svd", (282.667680, 133.904151)),
        ("asvd", (292.747723, 126.821900)),
        ("lord-affine", (105.206813, 10.998906)),
        ("rom", (257.468267, 160.526861)),
    ],
)
def test_worked_example(method, errors):
    for rank, expected in zip((1, 2), errors, strict=True):
        new, bias, _ = run(method, W.T, X.T, rank)
        assert error(W.T, new, X.T, bias) == pytest.approx(expected, abs=1e-5)


def test_worked_example_bias():
    """The outer bias is b plus what `truncate` returns."""
    expected = {
        1: (4.056845, 2.474548, 1.058182, 1.988999),
        2: (3.968005, 2.549626, 0.568805, 2.439069),
    }
    for rank, bias in expected.items():
        np.testing.assert_allclose(B + run("lord-affine", W.T, X.T, rank)[1], bias, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lord-linear", "svd-llm"])
def test_error_is_the_tail_of_singular_values(shape, method):
    kernel, x = problem(shape)
    tail = np.linalg.svd(x @ kernel, compute_uv=False) ** 2
    for rank in (1, 7, 20):
        new, _, factors = run(method, kernel, x, rank)
        assert error(kernel, new, x) == pytest.approx(tail[rank:].sum(), rel=1e-9)
        predicted = float(jnp.sum(factors.spectrum[rank:])) * len(x)
        assert predicted == pytest.approx(tail[rank:].sum(), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_whitening_by_cholesky(shape):
    """SVD-LLM as published, with a Cholesky factor and an inverse, is the same matrix."""
    kernel, x = problem(shape)
    s = np.linalg.cholesky(x.T @ x)
    u, sigma, vt = np.linalg.svd(kernel.T @ s)
    r = 9
    whitened = (u[:, :r] * sigma[:r]) @ vt[:r] @ np.linalg.inv(s)
    np.testing.assert_allclose(run("svd-llm", kernel, x, r)[0], whitened.T, atol=1e-8)


@pytest.mark.parametrize("shape", [(40, 25), (50, 50)])
@pytest.mark.parametrize("method", ["lord-linear", "lord-affine"])
def test_input_and_output_statistics_agree(shape, method):
    kernel, x = problem(shape, mean=1.5)
    by_input, bias_in, _ = run(method, kernel, x, 8)
    by_output, bias_out, _ = run(method, kernel, x, 8, side="output")
    np.testing.assert_allclose(by_input, by_output, atol=1e-8)
    if bias_in is not None:
        np.testing.assert_allclose(bias_in, bias_out, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_low_rank_matrix_is_better(shape):
    kernel, x = problem(shape, mean=0.7)
    rng, r = np.random.default_rng(1), 6
    best = error(kernel, run("lord-linear", kernel, x, r)[0], x)
    affine, bias, _ = run("lord-affine", kernel, x, r)
    best_affine = error(kernel, affine, x, bias)
    rivals = [run(m, kernel, x, r)[0] for m in ("svd", "asvd", "rom")]
    rivals += [rng.normal(size=(shape[0], r)) @ rng.normal(size=(r, shape[1])) for _ in range(20)]
    for rival in rivals:
        # The best right factor for this rival's input space, by least squares: a strong rival.
        space = np.linalg.svd(rival)[0][:, :r]
        refit = space @ np.linalg.lstsq(x @ space, x @ kernel, rcond=None)[0]
        assert best <= error(kernel, refit, x) * (1 + 1e-9)
        best_bias = (x @ kernel - x @ refit).mean(axis=0)
        assert best_affine <= error(kernel, refit, x, best_bias) * (1 + 1e-9)


@pytest.mark.full
def test_interlacing_of_centred_and_uncentred():
    """T(C, r+1) <= T(Σ, r) <= T(C, r): the bias is worth at most one rank."""
    kernel, x = problem((30, 20), mean=2.0)
    linear = np.asarray(run("lord-linear", kernel, x, 1)[2].spectrum)
    affine = np.asarray(run("lord-affine", kernel, x, 1)[2].spectrum)
    for r in range(19):
        tol = 1e-9 * linear.sum()
        assert linear[r + 1 :].sum() <= affine[r:].sum() + tol
        assert affine[r:].sum() <= linear[r:].sum() + tol


def test_rom_pays_for_the_mean_it_drops():
    kernel, x = problem((30, 20), mean=2.0)
    new, _, factors = run("rom", kernel, x, 5)
    mean = (x @ kernel).mean(axis=0)
    basis = np.asarray(factors.right[:5])
    lost = mean - mean @ basis.T @ basis
    expected = len(x) * (float(factors.spectrum[5:].sum()) + lost @ lost)
    assert error(kernel, new, x) == pytest.approx(expected, rel=1e-9)
    assert error(kernel, new, x) >= error(kernel, run("lord-linear", kernel, x, 5)[0], x)


def test_affine_bias_restores_the_mean_and_is_not_zero():
    """Guards against a published bug in which the bias was rounding noise."""
    kernel, x = problem((30, 21), mean=2.0)
    new, bias, _ = run("lord-affine", kernel, x, 7)
    mean = (x @ kernel).mean(axis=0)
    np.testing.assert_allclose((x @ new + np.asarray(bias)).mean(axis=0), mean, rtol=1e-9)
    assert np.linalg.norm(bias) > 1e-3 * np.linalg.norm(mean)


@pytest.mark.parametrize("shape", SHAPES)
def test_right_factor_is_orthonormal_and_latent_is_diagonal(shape):
    kernel, x = problem(shape)
    factors = run("lord-linear", kernel, x, 1)[2]
    width = min(shape)
    np.testing.assert_allclose(factors.right @ factors.right.T, np.eye(width), atol=1e-12)
    latent = x @ np.asarray(factors.left)
    scale = float(factors.spectrum[0])
    np.testing.assert_allclose(
        latent.T @ latent / len(x), np.diag(factors.spectrum), atol=1e-10 * scale
    )


def test_nesting_and_idempotence():
    kernel, x = problem((30, 20))
    at_8, at_5 = (run("lord-linear", kernel, x, r)[0] for r in (8, 5))
    np.testing.assert_allclose(run("lord-linear", at_8, x, 5)[0], at_5, atol=1e-10)
    np.testing.assert_allclose(run("lord-linear", at_5, x, 5)[0], at_5, atol=1e-10)


def test_invariance_to_a_change_of_input_basis():
    kernel, x = problem((30, 20))
    t = np.random.default_rng(3).normal(size=(30, 30))
    new = run("lord-linear", kernel, x, 6)[0]
    moved = run("lord-linear", np.linalg.solve(t, kernel), x @ t, 6)[0]
    np.testing.assert_allclose(x @ t @ moved, x @ new, atol=1e-7)


def test_white_inputs_give_plain_svd():
    kernel, _ = problem((30, 20))
    x = np.linalg.qr(np.random.default_rng(0).normal(size=(90, 30)))[0] * np.sqrt(90)
    plain = run("svd", kernel, x, 6)[0]
    np.testing.assert_allclose(run("lord-linear", kernel, x, 6)[0], plain, atol=1e-9)


def test_variants_agree_without_a_mean():
    kernel, x = problem((30, 20))
    x = x - x.mean(axis=0)
    linear = run("lord-linear", kernel, x, 6)[0]
    for method in ("lord-affine", "rom"):
        np.testing.assert_allclose(run(method, kernel, x, 6)[0], linear, atol=1e-9)


def test_fewer_tokens_than_inputs():
    """The Gram is singular: Cholesky would fail, PCA is still exact."""
    kernel, x = problem((50, 30), tokens=20)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(x.T @ x - 1e-9 * np.eye(50))
    tail = np.linalg.svd(x @ kernel, compute_uv=False) ** 2
    for method in ("lord-linear", "svd-llm"):
        assert error(kernel, run(method, kernel, x, 6)[0], x) == pytest.approx(tail[6:].sum())


def test_asvd_is_svd_of_the_scaled_weight():
    kernel, x = problem((30, 20))
    s = np.abs(x).mean(axis=0) ** 0.5
    u, sigma, vt = np.linalg.svd(s[:, None] * kernel, full_matrices=False)
    published = (u[:, :6] * sigma[:6]) @ vt[:6] / s[:, None]
    np.testing.assert_allclose(run("asvd", kernel, x, 6)[0], published, atol=1e-9)


def test_fwsvd_is_svd_of_the_weighted_rows():
    kernel, _ = problem((30, 20))
    weights = np.random.default_rng(5).uniform(0.1, 4, 30)
    d = np.sqrt(weights)[:, None]
    u, sigma, vt = np.linalg.svd(d * kernel, full_matrices=False)
    published = (u[:, :6] * sigma[:6]) @ vt[:6] / d
    stats = {"row_fisher": jnp.asarray(weights)}
    new, _ = truncate(METHODS["fwsvd"].factor(jnp.asarray(kernel), stats), 6)
    np.testing.assert_allclose(new.materialize(), published, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("shape", SHAPES)
def test_lord_is_optimal_in_the_metric_of_the_gradients(shape):
    """No rank-r kernel has a smaller E (y-y')ᵀ M (y-y'), and the spectrum predicts it."""
    kernel, x = problem(shape)
    rng, r = np.random.default_rng(2), 6
    g = rng.normal(size=(300, shape[1])) * np.exp(rng.normal(size=shape[1]))
    basis = linalg.row_space(jnp.asarray(kernel))
    narrow = g if basis is None else g @ np.asarray(basis)
    new, _, factors = run("lord", kernel, x, r, gradients=narrow)
    m = g.T @ g / len(g)
    damping = linalg.GRADIENT_DAMPING * np.trace(narrow.T @ narrow) / len(g) / min(shape)
    m = m + damping * np.eye(shape[1])

    def loss(new):
        gap = x @ kernel - x @ new
        return np.einsum("ni,ij,nj->", gap, m, gap) / len(x)

    assert loss(new) == pytest.approx(float(factors.spectrum[r:].sum()), rel=1e-8)
    root = np.linalg.cholesky(m)
    tail = np.linalg.svd(x @ kernel @ root, compute_uv=False) ** 2 / len(x)
    assert loss(new) == pytest.approx(tail[r:].sum(), rel=1e-8)
    assert loss(new) <= loss(run("lord-linear", kernel, x, r)[0])


def test_factors_in_the_loss_metric_are_balanced():
    """Gradients of 1e-6 must not push one factor out of half precision's range."""
    kernel, x = problem((30, 20))
    g = 1e-6 * np.random.default_rng(2).normal(size=(300, 20))
    factors = run("lord", kernel, x, 1, gradients=g)[2]
    norms = np.linalg.norm(factors.left, axis=0), np.linalg.norm(factors.right, axis=1)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-9)
    half = np.asarray(factors.left, np.float16) @ np.asarray(factors.right, np.float16)
    assert np.linalg.norm(half - kernel) < 5e-3 * np.linalg.norm(kernel)


def test_isotropic_gradients_make_lord_linear():
    kernel, x = problem((30, 20))
    g = 3 * np.eye(20)
    np.testing.assert_allclose(
        run("lord", kernel, x, 6, gradients=g)[0], run("lord-linear", kernel, x, 6)[0], atol=1e-9
    )


@pytest.mark.parametrize("method", sorted(LOW_RANK_METHODS))
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces(method, shape):
    kernel, x = problem(shape)
    new, bias, _ = run(method, kernel, x, min(shape))
    np.testing.assert_allclose(new, kernel, atol=1e-8)
    if bias is not None:
        np.testing.assert_allclose(bias, 0, atol=1e-8)


@pytest.mark.full
def test_corrective_target_beats_both_others():
    """‖WX - W'X̂‖² of reduced-rank regression is the optimum of its objective."""
    kernel, x = problem((20, 15), tokens=400)
    x_hat = x + np.random.default_rng(4).normal(size=x.shape) * x.std(axis=0)
    r, y = 5, x @ kernel

    def loss(new):
        return ((y - x_hat @ new) ** 2).sum()

    cross = jnp.asarray(x_hat.T @ y)
    target = _regress(moments(x_hat), moments(y), cross, centred=False)
    corrective = run("lord-linear", target, x_hat, r)[0]
    own = run("lord-linear", kernel, x_hat, r)[0]
    original = run("lord-linear", kernel, x, r)[0]
    assert loss(corrective) < min(loss(own), loss(original))
    # Optimum by theory, without the ridge.
    full = np.linalg.lstsq(x_hat, y, rcond=None)[0]
    tail = np.linalg.svd(x_hat @ full, compute_uv=False)[r:] ** 2
    optimum = ((y - x_hat @ full) ** 2).sum() + tail.sum()
    assert optimum <= loss(corrective) <= optimum * (1 + 1e-3)


def test_corrective_bias_meets_the_untouched_mean():
    kernel, x = problem((20, 15), tokens=400, mean=1.0)
    x_hat = x + np.random.default_rng(4).normal(size=x.shape) + 0.5
    y = x @ kernel
    target = _regress(moments(x_hat), moments(y), jnp.asarray(x_hat.T @ y), centred=True)
    mean = jnp.asarray(y.mean(axis=0))
    new, bias, _ = run("lord-affine", target, x_hat, 5, target_mean=mean)
    np.testing.assert_allclose((x_hat @ new + np.asarray(bias)).mean(axis=0), mean, atol=1e-8)


def test_dead_layer_and_singular_metric_are_finite():
    kernel, x = problem((30, 20))
    zero = np.zeros_like(x)
    for method in LOW_RANK_METHODS:
        for inputs, gradients in ((zero, None), (x, np.zeros((5, 20))), (zero, np.zeros((5, 20)))):
            new, _, factors = run(method, kernel, inputs, 4, gradients=gradients)
            assert np.isfinite(new).all()
            assert np.isfinite(np.asarray(factors.spectrum)).all()


def test_break_even():
    assert SiteSize.matrix(4096, 4096).limit == 2048
    assert SiteSize.matrix(4096, 11008).limit == pytest.approx(2985.2203, abs=1e-3)
    assert SiteSize.matrix(6144, 24576).limit == pytest.approx(4915.2)


@pytest.mark.full
def test_corrective_target_in_the_metric_of_the_gradients():
    """The metric has the coordinates of the original kernel, whichever kernel is factorized."""
    kernel, x = problem((15, 40), tokens=400)
    rng, r = np.random.default_rng(6), 4
    x_hat = x + rng.normal(size=x.shape) * x.std(axis=0)
    y, g = x @ kernel, rng.normal(size=(500, 40)) * np.exp(2 * rng.normal(size=40))
    basis = linalg.row_space(jnp.asarray(kernel))
    target = _regress(moments(x_hat), moments(y), jnp.asarray(x_hat.T @ y), centred=False)
    stats = {"input": moments(x_hat), "gradients": moments(g @ np.asarray(basis)), "basis": basis}
    new = truncate(METHODS["lord"].factor(target, stats), r)[0].materialize()
    plain = truncate(METHODS["lord-linear"].factor(target, stats), r)[0].materialize()

    def loss(new):
        gap = (y - x_hat @ np.asarray(new)) @ np.asarray(basis)
        return np.einsum(
            "ni,ij,nj->", gap, np.asarray(basis).T @ (g.T @ g) @ np.asarray(basis), gap
        )

    assert loss(new) < loss(plain)
    # Optimum over rank-r corrections of the regressed kernel, in the metric (no damping, no ridge).
    m = np.asarray(basis).T @ (g.T @ g) @ np.asarray(basis)
    root = np.linalg.cholesky(m)
    full = np.linalg.lstsq(x_hat, y, rcond=None)[0]
    tail = np.linalg.svd(x_hat @ full @ np.asarray(basis) @ root, compute_uv=False)[r:] ** 2
    assert loss(full) + tail.sum() <= loss(new) * (1 + 1e-9)
    assert loss(new) <= 1.1 * (loss(full) + tail.sum())


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e20])
def test_axes_in_float32_cost_what_their_numbers_say(scale):
    """Axes of a GPU: orthonormal, with exact costs, as good as eigenvectors for half the rank."""
    size = 96
    turn = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (size, size), jnp.float64))[0]
    a = scale * (turn * 10 ** (-6 * jnp.arange(size) / size)[None]) @ turn.T
    values, axes = linalg.principal_axes(a, rounded=True)
    exact, _ = linalg.principal_axes(a, rounded=False)
    np.testing.assert_allclose(axes.T @ axes, np.eye(size), rtol=0, atol=1e-9)
    np.testing.assert_allclose(values, jnp.diagonal(axes.T @ a @ axes), rtol=1e-6)
    assert jnp.all(jnp.diff(values) <= 0)
    np.testing.assert_allclose(values.sum(), jnp.trace(a), rtol=1e-9)
    for rank in (size // 4, size // 2):
        np.testing.assert_allclose(values[rank:].sum(), exact[rank:].sum(), rtol=1e-5)


def test_axes_of_a_matrix_of_zeros_are_orthonormal():
    values, axes = linalg.principal_axes(jnp.zeros((5, 5), jnp.float64), rounded=True)
    np.testing.assert_allclose(axes.T @ axes, np.eye(5), rtol=0, atol=1e-9)
    assert not values.any()
