"""`compress_params`: budgets, plans, and errors as predicted, for every method."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import LAYERS, MODELS, loss, scanned, unrolled

from lordjax import (
    METHODS,
    QUANTIZERS,
    Plan,
    collect,
    compress_params,
    compressed,
    find_sites,
    materialize,
    nbytes,
)
from lordjax.compression.site_factors import factor_site
from lordjax.functions.compressing import _check_method
from lordjax.kernels import trees
from lordjax.kernels.layout import Rearranged
from lordjax.models.sites import Site

LOW_RANK = ["svd", "fwsvd", "asvd", "svd-llm", "lord", "lord-linear", "lord-centred", "modegpt"]
BUDGETS = {name: {"keep": 0.6} for name in LOW_RANK} | {
    "nf": {"bits": 4.5},
    "lq": {"bits": 4.0, "rank": 2},
    "auto": {"bits": 6.0},
}


@pytest.fixture(scope="module")
def taken():
    """``name -> (model, statistics)`` with a loss, taken once."""
    found = {}

    def get(name):
        if name not in found:
            model = MODELS[name]()
            options = {"loss": loss} if name != "recurrent" else {}
            found[name] = model, collect(model.apply, model.params, model.batches, **options)
        return found[name]

    return get


def test_methods_of_the_table_are_all_known():
    for name in METHODS:
        try:
            _check_method(name, ())
        except ValueError as error:
            assert "modegpt or lord" in str(error)
        else:
            assert name in BUDGETS or name == "lord-affine"
    assert set(QUANTIZERS) < set(BUDGETS)


@pytest.mark.quick("scanned-modegpt")
@pytest.mark.parametrize("method", BUDGETS)
@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_every_method_meets_its_budget_and_runs(taken, method, name):
    model, stats = taken(name)
    if method == "fwsvd":
        stats = collect(model.apply, model.params, model.batches, loss=loss, method="fwsvd")
    small, plan = compress_params(model.params, stats, method=method, **BUDGETS[method])
    assert plan.method == method
    dense = sum(np.prod(stats.sites[path].shape) for path in stats.sites.names())
    others = nbytes(model.params) - 4 * dense
    own = nbytes(small) - others
    if "keep" in BUDGETS[method]:
        assert own <= 4 * 0.6 * dense and any(rank for rank in plan.ranks.values())
    elif method != "lq":  # whose budget counts quantized weights alone
        assert own <= BUDGETS[method]["bits"] / 8 * dense
    ids = model.batches[0]
    found = jax.jit(compressed(model.apply))(small, ids)
    assert found.shape == (2, 6, 29) and np.isfinite(found).all()


@pytest.mark.full
@pytest.mark.parametrize("method", ["svd-llm", "lord", "auto"])
def test_stacks_have_one_rank_and_the_sum_of_their_errors(taken, method):
    model, stats = taken("scanned")
    small, plan = compress_params(model.params, stats, method=method, **BUDGETS[method])
    assert "blocks/up" in plan.ranks
    leaf = small["blocks"]["up"]
    assert leaf.shape == (LAYERS, 16, 24)


@pytest.mark.full
def test_factors_are_those_of_the_method_on_each_matrix(taken):
    model, stats = taken("scanned")
    plan = Plan(
        "svd-llm", dict.fromkeys(stats.sites.names(), None) | {"blocks/up": 4}, 0.5, "given"
    )
    small, _ = compress_params(model.params, stats, plan=plan)
    for i in range(LAYERS):
        parts = [jax.tree.map(lambda a, i=i: a[i], fold["blocks/up"]) for fold in stats.folds]
        total = parts[0]["input"].merge(parts[1]["input"])
        site = Site("up", 0, "linear", ("up",), "")
        kernel = model.params["blocks"]["up"][i]
        wanted = factor_site("svd-llm", site, "up", kernel, {"input": total})
        found = small["blocks"]["up"]
        np.testing.assert_allclose(
            found.left[i] @ found.right[i],
            wanted.left[:, :4] @ wanted.right[:4],
            atol=1e-4,
        )


@pytest.mark.full
def test_layouts_are_kept_at_every_rank(taken):
    model, stats = taken("transposed")
    rows = {path: stats.sites[path] for path in stats.folds[0]}
    limits = {p: r.fan_in * r.fan_out / (r.fan_in + r.fan_out) for p, r in rows.items()}
    plan = Plan("svd", {p: max(1, int(np.ceil(limits[p])) - 1) for p in rows}, None, "given")
    small, _ = compress_params(model.params, stats, plan=plan)
    wanted = model.apply(materialize(small), model.batches[0])
    np.testing.assert_allclose(compressed(model.apply)(small, model.batches[0]), wanted, atol=1e-4)
    # A kernel [out, in] is a matrix [in, out] behind a layout.
    assert isinstance(small["blocks"][0]["fc1"]["kernel"], Rearranged)


@pytest.mark.full
def test_predicted_errors_are_those_of_the_outputs(taken):
    model, stats = taken("unrolled")
    plan = dict.fromkeys(stats.sites.names()) | {"blocks/1/gate": 3}
    small, _ = compress_params(model.params, stats, plan=Plan("svd-llm", plan, None, "given"))
    from lordjax.functions.fitting.linear import fit_linear

    leaf = model.params["blocks"][1]["gate"]
    fitted = fit_linear("svd-llm", stats.sites["blocks/1/gate"], leaf, stats.folds)
    total = stats.folds[0]["blocks/1/gate"]["input"].merge(stats.folds[1]["blocks/1/gate"]["input"])
    error = np.asarray(leaf - materialize(small["blocks"][1]["gate"]))
    lost = np.trace(error.T @ np.asarray(total.second_moment()) @ error)
    np.testing.assert_allclose(fitted.errors[0][3], lost, rtol=1e-3)
    assert (fitted.errors[1] >= fitted.errors[0] - 1e-9).mean() > 0.5  # on unseen data


@pytest.mark.full
def test_loss_is_predicted(taken):
    model, stats = taken("unrolled")
    _, plan = compress_params(model.params, stats, method="lord", keep=0.7)
    assert 0 < plan.predicted["in_sample"] < plan.predicted["held_out"]
    assert plan.policy == "global" and plan.gap is not None


@pytest.mark.full
def test_plans_are_json_and_may_be_edited(taken, tmp_path):
    model, stats = taken("unrolled")
    small, plan = compress_params(model.params, stats, method="lord", keep=0.7)
    plan.write(tmp_path / "plan.json")
    again, same = compress_params(model.params, stats, plan=Plan.read(tmp_path / "plan.json"))
    assert same == plan
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)
    text = json.loads((tmp_path / "plan.json").read_text())
    text["ranks"] = dict.fromkeys(text["ranks"], None) | {"head": 5}
    (tmp_path / "plan.json").write_text(json.dumps(text))
    edited, _ = compress_params(model.params, stats, plan=Plan.read(tmp_path / "plan.json"))
    assert edited["head"].rank == 5 and edited["blocks"][0]["q"] is model.params["blocks"][0]["q"]


@pytest.mark.full
@pytest.mark.parametrize("method", ["auto", "lq"])
def test_plans_of_quantized_trees_are_given_back(taken, method):
    model, stats = taken("unrolled")
    small, plan = compress_params(model.params, stats, method=method, **BUDGETS[method])
    again, _ = compress_params(
        model.params, stats, plan=plan, **({"rank": 2} if method == "lq" else {})
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_methods_without_data_need_only_the_table():
    model = unrolled()
    table = find_sites(model.apply, model.params, model.batches[0])
    for method in ("svd", "nf", "lq"):
        small, _ = compress_params(model.params, table, method=method, **BUDGETS[method])
        assert nbytes(small) < nbytes(model.params)
    with pytest.raises(ValueError, match="needs moments, which the statistics lack"):
        compress_params(model.params, table, method="svd-llm", keep=0.5)


@pytest.mark.full
def test_some_sites_only(taken):
    model, stats = taken("unrolled")
    small, plan = compress_params(
        model.params, stats, method="svd-llm", keep=0.75, where="gate|up|down"
    )
    assert {path.split("/")[-1] for path in plan.ranks} == {"gate", "up", "down"}
    assert small["head"] is model.params["head"]


@pytest.mark.full
def test_a_mean_is_corrected_by_the_bias_of_a_site(taken):
    model, stats = taken("transposed")
    assert stats.sites["blocks/0/fc1/kernel"].bias == "blocks/0/fc1/bias"
    small, _ = compress_params(model.params, stats, method="lord-centred", keep=0.5)
    old, new = (tree["blocks"][0]["fc1"]["bias"] for tree in (model.params, small))
    assert new.shape == old.shape and not np.allclose(old, new)


@pytest.mark.full
def test_bytes_are_a_budget_too(taken):
    model, stats = taken("unrolled")
    own = sum(4 * np.prod(stats.sites[path].shape) for path in stats.sites.names())
    for method in ("svd-llm", "auto"):
        _, plan = compress_params(model.params, stats, method=method, budget_bytes=int(own // 2))
        assert plan.ranks


@pytest.mark.full
def test_experts_share_a_rank(taken):
    model, stats = taken("dispatched")
    small, plan = compress_params(model.params, stats, method="svd-llm", keep=0.5)
    assert plan.ranks["down"] and small["down"].shape == (2, 24, 16)
    found = compressed(model.apply)(small, model.batches[0])
    wanted = model.apply(materialize(small), model.batches[0])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.full
def test_other_dtypes_are_kept(taken):
    model = unrolled()
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    stats = collect(model.apply, params, model.batches, loss=loss)
    for method in ("lord", "auto"):
        small, _ = compress_params(params, stats, method=method, **BUDGETS[method])
        shapes = jax.eval_shape(materialize, small)
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.bfloat16)}
        out = compressed(model.apply)(small, model.batches[0])
        assert out.dtype == model.apply(params, model.batches[0]).dtype


@pytest.mark.full
@pytest.mark.parametrize("method", ["lord", "modegpt", "auto"])
@pytest.mark.parametrize("name", ["unrolled", "scanned"])
def test_bytes_of_a_plan_are_known_from_shapes(taken, name, method):
    model, stats = taken(name)
    small, plan = compress_params(model.params, stats, method=method, **BUDGETS[method])
    shapes = jax.eval_shape(lambda: (model.params, model.batches[0]))
    table = find_sites(model.apply, *shapes)
    flat, old = trees.flatten(small), trees.flatten(model.params)
    sites = sum(nbytes(flat[path]) for path in table.names())
    assert table.nbytes(plan) == sites < sum(nbytes(old[path]) for path in table.names())
    with pytest.raises(KeyError, match="no parameter 'x'"):
        table.nbytes(Plan("svd", {"x": 1}, None, "given"))


def refused(taken, match, error=ValueError, params=None, stats=None, **options):
    model, own = taken("unrolled")
    with pytest.raises(error, match=match):
        compress_params(params or model.params, stats or own, **options)


@pytest.mark.full
def test_bad_input_is_named(taken):
    model, _ = taken("unrolled")
    refused(taken, "no method 'lrod'", KeyError, method="lrod", keep=0.5)
    refused(taken, "needs attention modules", method="modegpt-cr", keep=0.5)
    refused(taken, "run block by block", method="rom", keep=0.5)
    refused(taken, "exactly one of keep, budget_bytes and plan, got none", method="lord")
    refused(taken, "exactly one of keep.* got bits", method="lord", bits=3)
    refused(taken, "exactly one of bits.* got keep", method="auto", keep=0.5)
    refused(taken, r"keep must be in \(0, 1\]", method="lord", keep=1.5)
    refused(taken, "keep 0.001 cannot be met", method="svd", keep=0.001)
    refused(taken, "bits per weight cannot be met", method="nf", bits=1)
    refused(taken, "knows blocks by their numbers", method="lord", keep=0.5, allocation="per-type")
    refused(taken, r"no site matches '\^x\$'", KeyError, method="svd", keep=0.5, where="^x$")
    plan = Plan("svd", {"head": 3}, None, "given")
    refused(taken, "blocks/0/down is missing", plan=plan)
    plan = Plan("svd", dict.fromkeys(taken("unrolled")[1].sites.names(), 99), None, "given")
    refused(taken, r"rank 99 is not in \[1, ", plan=plan)
    other = model.params | {"head": model.params["head"] * 2}
    refused(taken, "head: its values are not those", params=other, method="svd", keep=0.5)
    other = model.params | {"head": jnp.ones((16, 4))}
    refused(taken, r"head: the statistics are those of another tree", params=other, keep=0.5)
    other = scanned().params
    refused(taken, r"blocks/0/down: the statistics.* got nothing", params=other, keep=0.5)
