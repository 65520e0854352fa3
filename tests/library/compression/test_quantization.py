"""Quantized models: budgets are kept, plans are reproducible, mistakes are explained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import shifted

from lordjax.allocation.candidates import QUANTIZERS, Candidate
from lordjax.allocation.plan import Plan
from lordjax.compression import elastic
from lordjax.compression.low_rank import compress, prepare
from lordjax.compression.quantized import check_settings, prepare_quantized, quantize
from lordjax.compression.result import verify
from lordjax.evaluate import perplexity
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import nbytes
from lordjax.kernels.low_rank import LowRank
from lordjax.kernels.quantized import LowRankPlusQuantized, NFQuantized
from lordjax.models import ModelConfig, Transformer
from lordjax.models.sites import LINEAR_SITES, site_path
from lordjax.models.source import InMemory
from lordjax.storage import checkpoint

# One kernel shape and three formats, because compiling takes the time. test_cli has the others.
CONFIG = ModelConfig(97, 64, 64, 2, 4, 4, 16, 128, tie_embeddings=True)
TOKENS = np.random.default_rng(0).integers(0, 97, (4, 24)).astype(np.int32)
FORMATS = (
    normal_float.Format(2, 4, "bfloat16", 16, 256),
    normal_float.Format(3, 4, "bfloat16", 32, 256),
    normal_float.Format(4, 4, "bfloat16", 64, 256),
)
SITES = [site_path(i, site) for i in range(CONFIG.num_layers) for site in LINEAR_SITES]
BITS = {"nf": 3.3, "lq": 3.3, "auto": 5.0}
SMALL = {"formats": FORMATS, "steps": 2}
FIRST = "layer_0/attention/q/kernel"
ONE_BUDGET = "exactly one of bits, budget_bytes, file_bytes and format"


@pytest.fixture(scope="module")
def params():
    return shifted(CONFIG)


@pytest.fixture(scope="module")
def source(params):
    return InMemory(CONFIG, params)


@pytest.fixture(scope="module")
def prepared(source):
    """Every method is prepared once: its predicted errors serve all budgets."""
    rank = {"nf": None, "lq": 6, "auto": None}
    return {
        name: prepare_quantized(source, TOKENS, method=name, rank=rank[name], **SMALL)
        for name in QUANTIZERS
    }


@pytest.fixture(scope="module")
def results(prepared):
    return {name: prepared[name].compress(bits=bits) for name, bits in BITS.items()}


every_method = pytest.mark.parametrize("method", QUANTIZERS)


def logits(params):
    return np.asarray(Transformer(CONFIG).apply({"params": params}, TOKENS))


def kernels(params):
    flat = trees.flatten(params)
    return {path: flat[path] for path in SITES}


def promised(method, kernel):
    """The part of a kernel that the budget of a method counts."""
    if method == "lq":
        assert isinstance(kernel, LowRankPlusQuantized)
        return nbytes(kernel.base)
    return nbytes(kernel)


# --- budgets -------------------------------------------------------------------------------------


@every_method
def test_bits_that_were_promised_are_stored(prepared, results, method):
    result, count = results[method], prepared[method].count
    found = kernels(result.params)
    assert count == sum(kernel.shape[0] * kernel.shape[1] for kernel in found.values())
    counted = 8 * sum(promised(method, kernel) for kernel in found.values()) / count
    stored = 8 * nbytes(found) / count
    assert 0.9 * BITS[method] < counted <= BITS[method]
    assert result.plan.bits == pytest.approx(BITS[method])
    assert result.report["plan"]["bits_per_weight"] == pytest.approx(stored)
    assert result.report["bytes"] == nbytes(result.params)
    if method != "lq":  # its budget does not count low-rank terms
        assert counted == pytest.approx(stored)
    # The solver's tables hold the sizes that are stored.
    for path, table in prepared[method].tables.items():
        k = table.candidates.index(_option(result.plan, path))
        assert table.sizes[k] == promised(method, found[path])


@every_method
def test_every_budget_is_kept_and_more_is_better(prepared, method):
    quantizer, errors = prepared[method], []
    for bits in (2.6, 3.0, 3.7, 4.5, 20.0):
        plan = quantizer.plan(bits=bits)
        again = quantizer.plan(budget_bytes=round(bits * quantizer.count / 8))
        assert again.ranks == plan.ranks and again.formats == plan.formats
        spent, error = _promise(quantizer, plan)
        assert 8 * spent <= bits * quantizer.count
        assert plan.gap is not None and 0 <= plan.gap <= 1
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    if method == "auto":  # its tables include dense, which has no error
        assert errors[-1] == 0 and not plan.formats and set(plan.ranks.values()) == {None}


def _option(plan, path):
    text = plan.formats.get(path)
    return Candidate(None if text is None else normal_float.Format.parse(text), plan.ranks[path])


def _promise(quantizer, plan):
    """Bytes and predicted error of a plan."""
    rows = [(t, t.candidates.index(_option(plan, path))) for path, t in quantizer.tables.items()]
    return sum(t.sizes[i] for t, i in rows), sum(t.errors[i] for t, i in rows)


@every_method
def test_solvers_agree(prepared, method):
    quantizer = prepared[method]
    for bits in (3.5, 20.0):
        errors = {}
        for solver in ("bisection", "milp"):
            plan = quantizer.plan(bits=bits, solver=solver)
            spent, errors[solver] = _promise(quantizer, plan)
            assert 8 * spent <= bits * quantizer.count
            assert plan.policy == solver
        assert errors["milp"] <= errors["bisection"] <= errors["milp"] * 1.01


@every_method
def test_tables_hold_no_candidate_that_another_one_beats(prepared, method):
    for table in prepared[method].tables.values():
        assert (np.diff(table.sizes) > 0).all() and (np.diff(table.errors) < 0).all()
        assert np.isfinite(table.errors).all()


@every_method
def test_budgets_that_cannot_be_met(prepared, method):
    with pytest.raises(ValueError, match=rf"1 bits .* '{method}' needs at least 2\.\d+"):
        prepared[method].plan(bits=1)
    with pytest.raises(ValueError, match=r"needs at least .*; ask for more"):
        prepared[method].plan(budget_bytes=10)


# --- what is stored ------------------------------------------------------------------------------


def test_kinds_of_kernels(results):
    found = {name: kernels(result.params) for name, result in results.items()}
    assert all(isinstance(kernel, NFQuantized) for kernel in found["nf"].values())
    for kernel in found["lq"].values():
        assert kernel.rank == 6
        assert kernel.low_rank.left.dtype == np.float16
    products = [k.low_rank for k in found["auto"].values() if hasattr(k, "low_rank")]
    assert products
    for product in products:  # quantized in the method's own format
        assert str(product.left.format) == str(product.right.format) == QUANTIZERS["auto"].factors


@pytest.mark.quick("lq")
@every_method
def test_report_of_each_matrix(results, source, method):
    result = results[method]
    found, dense = kernels(result.params), kernels(source.params)
    assert set(result.report["layers"]) == set(SITES)
    for path, row in result.report["layers"].items():
        option = _option(result.plan, path)
        assert row["format"] == (None if option.form is None else str(option.form))
        assert row["rank"] == option.rank
        assert row["bytes"] == nbytes(found[path])
        have = found[path] if option == Candidate(None, None) else found[path].materialize()
        gap = np.asarray(have, np.float64) - np.asarray(dense[path])
        share = np.sum(gap**2) / np.sum(np.asarray(dense[path], np.float64) ** 2)
        assert row["relative_error"] == pytest.approx(share, rel=1e-3, abs=1e-9)
        assert 0 <= row["weighted_error"] < 1
    json.dumps(result.report)
    assert np.isfinite(logits(result.params)).all()


def test_low_rank_terms_lower_the_error(results):
    """With the same formats a low-rank term lowers every matrix's error."""
    for path in SITES:
        nf_row, lq_row = (results[m].report["layers"][path] for m in ("nf", "lq"))
        if nf_row["format"] == lq_row["format"]:
            assert lq_row["relative_error"] < nf_row["relative_error"]
    total = {
        m: sum(row["relative_error"] for row in results[m].report["layers"].values())
        for m in ("nf", "lq")
    }
    assert total["lq"] < total["nf"]


def test_other_parameters_do_not_change(results, params):
    for result in results.values():
        new, old = trees.flatten(result.params), trees.flatten(params)
        assert set(new) == set(old)
        for path in set(old) - set(SITES):
            np.testing.assert_array_equal(new[path], old[path])


def test_one_format_for_all(source):
    """Without error feedback and a low-rank term, `NFQuantized.encode` makes the same."""
    result = quantize(source, method="nf", form="nf4")
    for path, kernel in kernels(source.params).items():
        expected = NFQuantized.encode(kernel, normal_float.Format())
        jax.tree.map(np.testing.assert_array_equal, trees.flatten(result.params)[path], expected)
    assert result.plan.policy == "uniform"
    assert result.report["plan"]["bits_per_weight"] == pytest.approx(4.13, abs=0.02)
    assert "calibration" not in result.report


@pytest.mark.quick("nf")
@pytest.mark.parametrize("method", ["nf", "lq"])
def test_feedback_loses_less_of_the_outputs(source, method):
    options = {"method": method, "form": "nf3", "weighting": "input", "steps": 2}
    options |= {"rank": 4} if method == "lq" else {}
    alone, together = (
        quantize(source, TOKENS, feedback=feedback, **options) for feedback in (False, None)
    )
    assert alone.report["bytes"] == together.report["bytes"]
    rows = [result.report["layers"] for result in (alone, together)]
    total = [sum(row["weighted_error"] for row in each.values()) for each in rows]
    assert total[1] < 0.8 * total[0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_that_of_all_that_is_not_quantized(prepared, dtype):
    quantizer = dataclasses.replace(prepared["lq"], dtype=dtype)
    result = quantizer.apply(quantizer.uniform(FORMATS[1], 6))
    flat = trees.flatten(result.params)
    assert {flat[path].low_rank.dtype for path in SITES} == {jnp.dtype(dtype)}
    assert {flat[path].dtype for path in set(flat) - set(SITES)} == {jnp.dtype(dtype)}


def test_indices_stay_indices(params):
    """A model with selected rotary pairs holds indices, which no dtype changes."""
    path, index = "layer_1/attention/rope_index", np.tile(np.arange(8, dtype=np.int32), (4, 1))
    selected = trees.unflatten({**trees.flatten(params), path: index})
    options = {"method": "nf", "form": "nf4", "dtype": "float16"}
    result = quantize(InMemory(CONFIG, selected), **options)
    found = trees.flatten(result.params)[path]
    np.testing.assert_array_equal(found, index)
    assert found.dtype == np.int32


def test_zero_matrix(prepared, results, params):
    zero = trees.update(params, {FIRST: jnp.zeros((64, 64))})
    quantizer = dataclasses.replace(prepared["lq"], source=InMemory(CONFIG, zero))
    np.testing.assert_array_equal(quantizer.tables[FIRST].errors, 0)
    result = quantizer.apply(results["lq"].plan)
    assert not np.any(trees.flatten(result.params)[FIRST].materialize())
    assert result.report["layers"][FIRST]["relative_error"] == 0
    assert result.report["layers"][FIRST]["weighted_error"] == 0


# --- plans ---------------------------------------------------------------------------------------


@every_method
def test_a_written_plan_makes_the_same_model(prepared, results, tmp_path, method):
    result = results[method]
    result.plan.write(tmp_path / "plan.json")
    plan = Plan.read(tmp_path / "plan.json")
    assert plan == result.plan
    again = prepared[method].apply(plan)
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


def test_an_edited_plan_is_followed(prepared, results):
    """All formats come from the plan alone, those of low-rank factors, too."""
    plan = results["nf"].plan
    edited = dataclasses.replace(plan, formats={**plan.formats, FIRST: "nf8"})
    flat = trees.flatten(prepared["nf"].apply(edited).params)
    assert flat[FIRST].format == normal_float.Format(8)
    assert all(str(flat[path].format) == plan.formats[path] for path in SITES[1:])
    plan = dataclasses.replace(results["lq"].plan, factors="nf8")
    result = prepared["lq"].apply(plan)
    assert result.plan == plan
    for path in SITES:
        kernel, before = (trees.flatten(p)[path] for p in (result.params, results["lq"].params))
        jax.tree.map(np.testing.assert_array_equal, kernel.base, before.base)
        assert kernel.low_rank.left.format == kernel.low_rank.right.format == normal_float.Format(8)


@pytest.mark.full
def test_matrices_that_are_not_quantized(prepared, results, source):
    """Dense in half precision, or the low-rank term of least weighted error alone."""
    plan, second = results["auto"].plan, SITES[1]
    formats = {path: text for path, text in plan.formats.items() if path not in (FIRST, second)}
    ranks = {**plan.ranks, FIRST: None, second: 40}
    plan = dataclasses.replace(plan, ranks=ranks, formats=formats, factors=None)
    result = prepared["auto"].apply(plan)
    flat, rows = trees.flatten(result.params), result.report["layers"]
    dense = trees.flatten(source.params)[FIRST]
    np.testing.assert_array_equal(flat[FIRST], np.asarray(dense, np.float16))
    assert isinstance(flat[second], LowRank)
    assert flat[second].rank == 40 and flat[second].dtype == np.float16
    assert rows[FIRST]["relative_error"] < 1e-6
    assert 0 < rows[second]["weighted_error"] < rows[second]["relative_error"] < 1
    assert rows[second]["bytes"] == 2 * 40 * (64 + 64)


@pytest.mark.parametrize(
    ("ranks", "formats", "message"),
    [
        ({"layer_9/mlp/up/kernel": 4}, {}, "layer_9/mlp/up/kernel is no matrix of a block"),
        ({FIRST: 64}, {}, rf"{FIRST}: rank 64 is not in \[1, 64\)"),
        ({}, {"layer_0/mlp/upp/kernel": "nf4"}, "layer_0/mlp/upp/kernel is no matrix"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(prepared, results, ranks, formats, message):
    plan = results["lq"].plan
    plan = dataclasses.replace(
        plan, ranks={**plan.ranks, **ranks}, formats={**plan.formats, **formats}
    )
    with pytest.raises(ValueError, match=message):
        prepared["lq"].apply(plan)


def test_a_plan_must_name_every_matrix(prepared, results):
    plan = results["nf"].plan
    fewer = {path: rank for path, rank in plan.ranks.items() if path != FIRST}
    with pytest.raises(ValueError, match=FIRST):
        prepared["nf"].apply(dataclasses.replace(plan, ranks=fewer))


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.full
@every_method
def test_a_saved_model_is_the_same(results, tmp_path, method):
    result, directory = results[method], tmp_path / "model"
    checkpoint.save(
        directory,
        result.config,
        result.params,
        hf_config={"model_type": "llama"},
        plan=result.plan,
        report=result.report,
    )
    config, params = elastic.load(directory)
    np.testing.assert_array_equal(logits(params), logits(result.params))
    files = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert result.report["bytes"] < files < result.report["bytes"] + 40_000  # headers
    assert Plan.read(directory / "plan.json") == result.plan
    assert np.isfinite(perplexity(config, params, TOKENS)["perplexity"])


# --- quantized factors of other methods ----------------------------------------------------------


@pytest.fixture(scope="module")
def lord(source):
    return prepare(source, TOKENS, method="lord-linear")


@pytest.mark.full
@pytest.mark.parametrize(("factors", "tolerance"), [("nf8", 0.03), ("nf4", 0.3)])
def test_quantized_factor_pairs(lord, source, factors, tolerance):
    plain, coded = lord.compress(0.6), lord.compress(0.6, factors=factors)
    assert coded.plan == dataclasses.replace(plain.plan, factors=factors)
    before, after = kernels(plain.params), kernels(coded.params)
    pairs = [path for path in SITES if isinstance(before[path], LowRank)]
    assert pairs
    for path in pairs:
        kernel = after[path]
        assert isinstance(kernel, LowRank)
        for factor in (kernel.left, kernel.right):
            assert isinstance(factor, NFQuantized)
            assert factor.format == normal_float.Format.parse(factors)
        assert (
            nbytes(kernel)
            < nbytes(before[path]) * (normal_float.Format.parse(factors).bits + 1) / 32
        )
        dense, codes = (np.asarray(each[path].materialize()) for each in (before, after))
        assert np.linalg.norm(codes - dense) < tolerance * np.linalg.norm(dense)
    verify(coded.params, coded.plan, lord.sizes, coded.config)
    with pytest.raises(ValueError, match="'nf5' is no format"):
        compress(source, TOKENS, keep=0.6, factors="nf5")
    gap = logits(coded.params) - logits(plain.params)
    assert np.linalg.norm(gap) < 2 * tolerance * np.linalg.norm(logits(plain.params))


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "lqq"}, KeyError, "no method 'lqq'; did you mean lq"),
        ({"solver": "milpp"}, KeyError, "'milpp'; did you mean milp"),
        ({"weighting": "fishr"}, KeyError, "'fishr'; did you mean fisher"),
        ({"method": "nf", "rank": 4}, ValueError, "'nf' has no low-rank part; leave out the rank"),
        ({"method": "nf", "factors": "nf8"}, ValueError, "'nf' has no low-rank part"),
        ({"method": "auto", "rank": 4}, ValueError, "'auto' chooses ranks itself"),
        ({"method": "auto", "bits": None, "form": "nf4"}, ValueError, "chooses formats itself"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": 64}, ValueError, rf"rank 64 is not below the smaller side of {FIRST} \(64, 64\)"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"bits": None}, ValueError, ONE_BUDGET),
        (
            {"budget_bytes": 10_000},
            ValueError,
            ONE_BUDGET,
        ),
        ({"bits": float("nan")}, ValueError, "bits must be positive, got nan"),
        ({"bits": float("inf")}, ValueError, "bits must be positive, got inf"),
        ({"bits": None, "form": "nf5"}, ValueError, "bits and scale_bits must be among"),
        ({"factors": "int8"}, ValueError, "'int8' is no format; expected nf<bits>"),
        ({"weighting": "fisher"}, ValueError, "'fisher' needs calibration tokens, got none; pass"),
        ({"method": "auto"}, ValueError, "'both' needs calibration tokens, got none; pass"),
        (
            {"feedback": True},
            ValueError,
            "feedback needs a second moment .* 'none' .*input or both",
        ),
        ({"weighting": "input", "tokens": TOKENS + 97}, ValueError, "expected 0 to 96"),
        (
            {"weighting": "input", "tokens": TOKENS, "mask": np.ones((2, 3), bool)},
            ValueError,
            r"mask \(2, 3\): expected .* \(4, 24\)",
        ),
    ],
)
def test_wrong_arguments(source, options, error, message):
    options = {"method": "lq", "bits": 3.3, **SMALL, **options}
    with pytest.raises(error, match=message):
        quantize(source, options.pop("tokens", None), **options)


def test_unknown_names_are_explained_when_preparing(source):
    with pytest.raises(KeyError, match="no method 'lqq'; did you mean lq"):
        prepare_quantized(source, method="lqq")
    with pytest.raises(KeyError, match="'fishr'; did you mean fisher"):
        prepare_quantized(source, weighting="fishr")
    with pytest.raises(ValueError, match="has no low-rank part"):
        prepare_quantized(source, method="nf", rank=4)


def test_wrong_arguments_of_a_plan(prepared):
    with pytest.raises(ValueError, match=r"exactly one of bits, .* got None, None and None"):
        prepared["nf"].plan()
    with pytest.raises(ValueError, match=r"exactly one of bits, .* got 3, 9 and None"):
        prepared["nf"].plan(bits=3, budget_bytes=9)
    with pytest.raises(KeyError, match="no solver 'exact'"):
        prepared["nf"].plan(bits=3, solver="exact")


def test_which_settings_need_tokens():
    assert not check_settings("lq", bits=3)
    assert not check_settings("nf", form="nf4")
    assert check_settings("nf", bits=3, weighting="input")
    assert check_settings("auto", budget_bytes=10)


@pytest.mark.parametrize("options", [{"form": "nf4"}, {"bits": 3.3, **SMALL}])
def test_broken_weights_are_named(params, options):
    kernel = params["layer_1"]["mlp"]["up"]["kernel"]
    path = "layer_1/mlp/up/kernel"
    broken = trees.update(params, {path: kernel.at[3, 4].set(np.nan)})
    with pytest.raises(ValueError, match=rf"{path} is not finite|not finite at {path}$"):
        quantize(InMemory(CONFIG, broken), method="nf", **options)


@pytest.mark.full
def test_overflow_is_named(params):
    """A weight that float16 cannot hold is an error, not an infinity."""
    path = "layer_1/mlp_norm/scale"
    scale = params["layer_1"]["mlp_norm"]["scale"]
    large = trees.update(params, {path: scale.at[0].set(1e6)})
    with pytest.raises(ValueError, match=f"{path}.* not finite.*float16"):
        quantize(InMemory(CONFIG, large), method="nf", form="nf4", dtype="float16")
