"""Whole models: budgets are kept, blocks share compilations; statistics ignore batches, dtypes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import SMALL, shifted

from lordjax.allocation.plan import Plan, SiteSize
from lordjax.calibration import observers
from lordjax.compression.low_rank import PREFIXES, InMemory, compress, prepare
from lordjax.compression.result import verify
from lordjax.kernels import trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.low_rank import LowRank
from lordjax.methods import METHODS
from lordjax.models import Transformer
from lordjax.models.objective import loss_gradient
from lordjax.models.sites import LINEAR_SITES, site_path, sites_for

CONFIG = SMALL

TOKENS = np.random.default_rng(0).integers(0, 97, (6, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return shifted(CONFIG)


@pytest.fixture(scope="module")
def source(params):
    return InMemory(CONFIG, params)


def logits(config, params, tokens=TOKENS, mask=None):
    return Transformer(config).apply({"params": params}, tokens, mask)


def linear_weights(params):
    paths = [site_path(i, s) for i in range(CONFIG.num_layers) for s in LINEAR_SITES]
    flat = trees.flatten(params)
    return sum(nbytes(flat[path]) // 4 for path in paths)


def prefixes():
    """All methods with their own prefix; other prefixes with three methods; the rest is slow."""
    for method, prefix in itertools.product(sorted(METHODS), PREFIXES):
        quick = prefix == METHODS[method].prefix or method in ("lord", "lord-centred", "modegpt")
        yield pytest.param(method, prefix, marks=[] if quick else pytest.mark.slow)


@pytest.mark.quick("rom-compressed", "lord-dense")
@pytest.mark.parametrize(("method", "prefix"), list(prefixes()))
def test_every_method_keeps_its_budget(source, params, method, prefix):
    if prefix == "corrective" and "abs_mean" in METHODS[method].needs:
        with pytest.raises(ValueError, match="no corrective target"):
            compress(source, TOKENS, method=method, prefix=prefix)
        return
    before = jax.tree.map(np.array, params)
    result = compress(source, TOKENS, method=method, keep=0.6, prefix=prefix)
    share = linear_weights(result.params) / linear_weights(params)
    assert 0.4 < share <= 0.6
    assert result.report["plan"]["kept"] == pytest.approx(share)
    assert result.report["bytes"] == nbytes(result.params)
    new, old = trees.flatten(result.params), trees.flatten(params)
    sites = sites_for(METHODS[method].kinds, CONFIG)
    for i, site in itertools.product(range(CONFIG.num_layers), sites):
        rank = result.plan.ranks[site_path(i, site)]
        for path in (f"layer_{i}/{kernel}" for kernel in site.kernels):
            assert isinstance(new[path], LowRank) == (rank is not None and site.kind == "linear")
            if rank is not None and site.kind != "linear":  # nothing padded, nothing masked
                assert new[path].size < old[path].size
    assert np.isfinite(logits(CONFIG, result.params)).all()
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.quick("lord", "modegpt-cr")
@pytest.mark.parametrize("method", sorted(METHODS))
def test_keep_one_changes_nothing(source, params, method):
    result = compress(source, TOKENS, method=method, keep=1.0)
    jax.tree.map(np.testing.assert_array_equal, result.params, params)


def test_one_preparation_serves_every_budget(source):
    prepared = prepare(source, TOKENS, method="lord")
    curves, errors = prepared.curves(), []
    for keep in (0.9, 0.7, 0.5, 0.4):
        result = prepared.compress(keep)
        assert result.report["plan"]["kept"] <= keep
        assert result.plan.gap is not None
        ranks = result.plan.ranks.items()
        errors.append(sum(curves[path].errors[-1 if r is None else r] for path, r in ranks))
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


@pytest.mark.full
def test_result_does_not_depend_on_the_batch_size(source):
    a, b = (compress(source, TOKENS, method="lord", batch_size=n) for n in (1, 4))
    assert a.plan.ranks == b.plan.ranks
    np.testing.assert_allclose(logits(CONFIG, a.params), logits(CONFIG, b.params), atol=2e-4)


@pytest.mark.full
def test_padding_changes_nothing(source):
    mask = np.ones((6, 50), bool)
    mask[:, 40:] = False
    garbage = np.full((6, 10), 3, np.int32)
    padded = np.concatenate([TOKENS, garbage], axis=1)
    plain = prepare(source, TOKENS, method="lord")
    masked = prepare(source, padded, method="lord", mask=mask)
    for path, factors in plain.factors.items():
        scale = factors.spectrum[0]
        np.testing.assert_allclose(
            masked.factors[path].spectrum, factors.spectrum, atol=1e-5 * scale
        )


@pytest.mark.full
@pytest.mark.parametrize("method, prefix", [("lord", "dense"), ("rom", "compressed")])
def test_blocks_share_their_compilations(source, method, prefix):
    steps = (observers.observe, observers.observe_gradients, loss_gradient)

    def compiled():
        return [step._cache_size() for step in steps]

    for step in steps:
        step.clear_cache()
    options = {"method": method, "prefix": prefix, "allocation": "uniform", "batch_size": 2}
    compress(source, TOKENS, **options)
    first = compiled()
    compress(source, TOKENS, **options)
    assert compiled() == first
    groups = len({site.stage for site in LINEAR_SITES})
    assert first[0] <= (groups + 1 if prefix != "dense" else 2)
    assert first[1] <= 1
    assert first[2] <= 1


@pytest.mark.full
def test_sequential_equals_one_shot_where_the_prefix_is_the_original(source):
    """Only q, k, v of the first block: their inputs are the original model's either way."""
    prepared = {
        p: prepare(source, TOKENS, method="lord-linear", prefix=p) for p in ("dense", "compressed")
    }
    chosen = [f"layer_0/attention/{n}/kernel" for n in "qkv"]
    ranks = dict.fromkeys(prepared["dense"].sizes, None) | dict.fromkeys(chosen, 4)
    plan = Plan("lord-linear", ranks, 0.5, "by hand")
    a, b = (prepared[p].apply(plan).params for p in ("dense", "compressed"))
    np.testing.assert_allclose(logits(CONFIG, a), logits(CONFIG, b), atol=1e-4)


def test_sequential_sees_the_compressed_prefix(source):
    """Compressing an early layer changes the target of a later one, except with prefix dense."""
    ranks = dict.fromkeys(prepare(source, TOKENS, method="rom").sizes, None)
    late = "layer_2/mlp/down/kernel"
    results = {}
    for prefix in ("dense", "compressed"):
        prepared = prepare(source, TOKENS, method="lord-linear", prefix=prefix)
        for early in (None, 1):
            planned = ranks | {late: 8, "layer_0/mlp/down/kernel": early}
            plan = Plan("lord-linear", planned, 0.5, "by hand")
            kernel = trees.flatten(prepared.apply(plan).params)[late]
            results[prefix, early] = np.asarray(kernel.materialize())
    np.testing.assert_array_equal(results["dense", None], results["dense", 1])
    assert np.abs(results["compressed", None] - results["compressed", 1]).max() > 1e-4


@pytest.mark.full
def test_corrective_target_lowers_the_error_of_the_model(source):
    """The residual stream after the last block is closer to the original model's."""
    errors = {}
    for prefix in ("compressed", "corrective"):
        result = compress(source, TOKENS, method="lord-linear", keep=0.5, prefix=prefix)
        gap = logits(CONFIG, result.params) - logits(CONFIG, source.params)
        errors[prefix] = float(jnp.mean(gap**2))
    assert errors["corrective"] < errors["compressed"]


def test_dtype_of_the_result(source):
    result = compress(source, TOKENS, method="svd", keep=0.5, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.full
def test_bfloat16_model_is_compressed_and_stays_bfloat16(params):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    result = compress(InMemory(CONFIG, half), TOKENS, method="lord", keep=0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(logits(CONFIG, result.params)).all()


def test_report_of_each_layer(source):
    result = compress(source, TOKENS, method="lord", keep=0.5)
    assert set(result.report["layers"]) == set(result.plan.ranks)
    for path, row in result.report["layers"].items():
        assert row["rank"] == result.plan.ranks[path]
        assert 0 <= row["relative_error"] <= 1
        assert row["condition"] >= 1
        assert list(row["rank_of_energy"].values()) == sorted(row["rank_of_energy"].values())


def test_verify_finds_a_kernel_that_was_not_replaced(source, params):
    result = compress(source, TOKENS, method="svd", keep=0.5)
    sizes = {p: SiteSize.matrix(*trees.flatten(params)[p].shape) for p in result.plan.ranks}
    verify(result.params, result.plan, sizes, CONFIG)
    path = "layer_1/mlp/up/kernel"
    forgotten = trees.update(result.params, {path: trees.flatten(params)[path]})
    with pytest.raises(ValueError, match=f"{path} has {sizes[path].dense} weights"):
        verify(forgotten, result.plan, sizes, CONFIG)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method": "lrod"}, KeyError, "did you mean lord"),
        ({"allocation": "globl"}, KeyError, "did you mean global"),
        ({"prefix": "sparse"}, ValueError, "dense, compressed, corrective"),
        ({"batch_size": 0}, ValueError, "at least 1, got 0"),
        ({"gradient_windows": 0}, ValueError, "at least 1"),
        ({"mask": np.ones((2, 3), bool)}, ValueError, r"mask \(2, 3\): expected .* \(6, 40\)"),
        ({"keep": 0.0}, ValueError, r"keep must be in \(0, 1\], got 0.0"),
        ({"keep": 1.2}, ValueError, "got 1.2"),
    ],
)
def test_wrong_arguments(source, options, error, message):
    with pytest.raises(error, match=message):
        compress(source, TOKENS, **options)


@pytest.mark.full
@pytest.mark.parametrize("prefix", ["dense", "compressed", "corrective"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_do_not_depend_on_the_stored_dtype(source, params, dtype, prefix):
    """Half-precision checkpoints are calibrated in float32; the result keeps their dtype."""
    half = jax.tree.map(lambda a: a.astype(dtype), params)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    options = {"method": "lord", "keep": 0.5, "prefix": prefix, "allocation": "uniform"}
    low, high = (compress(InMemory(CONFIG, p), TOKENS, **options) for p in (half, wide))
    for path, leaf in trees.flatten(low.params).items():
        assert leaf.dtype == dtype, path
    if prefix == "dense":
        rounded = jax.tree.map(lambda a: np.asarray(a).astype(dtype), high.params)
        jax.tree.map(np.testing.assert_array_equal, low.params, rounded)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_9/mlp/up/kernel": 4}, "layer_9/mlp/up/kernel is not a site of this method"),
        ({"layer_0/mlp/up/kernel": 47}, r"layer_0/mlp/up/kernel: rank 47 is not in \[1, 30\)"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(source, change, message):
    prepared = prepare(source, TOKENS, method="svd")
    plan = Plan("svd", {**dict.fromkeys(prepared.sizes, None), **change}, 0.5, "by hand")
    with pytest.raises(ValueError, match=message):
        prepared.apply(plan)
    with pytest.raises(ValueError, match="layer_0/attention/q/kernel is missing"):
        prepared.apply(Plan("svd", {}, 0.5, "by hand"))


@pytest.mark.parametrize(
    "tokens, message",
    [
        (TOKENS[:0], "non-empty integer array"),
        (TOKENS[0], "non-empty integer array"),
        (TOKENS.astype(float), "float64"),
        (TOKENS + 97, "expected 0 to 96, the model's vocabulary"),
        (TOKENS - 97, "token id -"),
    ],
)
def test_wrong_tokens(source, tokens, message):
    with pytest.raises(ValueError, match=message):
        compress(source, tokens)


def test_non_finite_activation_is_named(params):
    broken = trees.update(
        params, {"layer_1/mlp/up/kernel": params["layer_1"]["mlp"]["up"]["kernel"] * jnp.inf}
    )
    with pytest.raises(ValueError, match=r"layer_1: non-finite activations at .*mlp"):
        compress(InMemory(CONFIG, broken), TOKENS, method="lord-linear")
