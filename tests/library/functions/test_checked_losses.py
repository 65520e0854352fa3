"""Predicted losses of a function are checked on batches that no statistic has seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import MODELS, loss, tokens

from lordjax import collect, compress_params, compressed, find_sites
from lordjax.allocation.measured_errors import WHOLE_KEPT, mean_loss
from lordjax.functions.fitting.low_rank import LowRankFit, places_of
from lordjax.functions.held_out import Comparison

BATCHES = [tokens(i, batch=8, length=12) for i in range(8)]


@pytest.fixture(
    scope="module", params=[pytest.param("unrolled", marks=pytest.mark.full), "scanned"]
)
def taken(request):
    model = MODELS[request.param]()
    return model, collect(model.apply, model.params, BATCHES, loss=loss)


def added(model, params):
    """The losses that other parameters add, on the last batch."""
    ids = BATCHES[-1]
    old, new = (loss(compressed(model.apply)(p, ids), ids) for p in (model.params, params))
    targets = np.asarray(old != 0)
    return mean_loss(np.asarray(new - old, np.float64)[targets])


def checked(taken, method):
    """The fit of a method after its check, and the function that puts leaves into the tree."""
    model, stats = taken
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): a for p, a in paths(model)}

    def tree(new):
        found = [new.get(path, leaf) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(model.params), found)

    rows = [stats.sites[path] for path in stats.sites.names()]
    fit = LowRankFit(method, stats.sites, rows, leaves, stats.folds, None)
    fit.check(Comparison(stats.held_out, model.params), tree, None)
    return fit, tree


def paths(model):
    return jax.tree_util.tree_flatten_with_path(model.params)[0]


def test_the_last_batch_is_in_no_statistic(taken):
    model, stats = taken
    fewer = collect(model.apply, model.params, BATCHES[:-1], loss=loss)
    jax.tree.map(np.testing.assert_array_equal, stats.folds, fewer.folds)
    assert fewer.held_out is None
    (batch,) = stats.held_out.batches
    assert batch[0] is BATCHES[-1]


@pytest.mark.parametrize("method", ["lord", "modegpt"])
def test_measured_losses_are_those_of_the_function_with_these_sites_compressed(taken, method):
    model, _ = taken
    fit, tree = checked(taken, method)
    assert len(fit.checked) > 3
    for row in fit.checked:
        measured = added(model, tree(fit._new(row["ranks"])))
        assert row["measured"] == pytest.approx(measured, rel=1e-3, abs=1e-6)


def test_a_plan_is_predicted_as_it_was_measured(taken):
    model, stats = taken
    small, plan = compress_params(model.params, stats, method="modegpt", keep=WHOLE_KEPT)
    assert plan.predicted["held_out"] == pytest.approx(added(model, small), rel=1e-3)
    _, other = compress_params(model.params, stats, method="modegpt", keep=WHOLE_KEPT, check=False)
    assert other.predicted["held_out"] != pytest.approx(plan.predicted["held_out"], rel=1e-3)


@pytest.mark.parametrize(
    ("count", "options"),
    [(7, {"loss": loss}), (8, {}), (8, {"loss": loss, "method": ["nf", "svd-llm"]})],
    ids=["few batches", "no loss", "no losses predicted"],
)
def test_where_nothing_is_checked_all_batches_are_read(count, options):
    model = MODELS["unrolled"]()
    stats = collect(model.apply, model.params, BATCHES[:count], **options)
    assert stats.held_out is None
    fold = stats.folds[0]["head"]["input"]
    assert fold.count == (count + 1) // 2 * BATCHES[0].size


@pytest.mark.full
def test_a_mean_is_no_loss_that_can_be_compared():
    model = MODELS["unrolled"]()
    stats = collect(model.apply, model.params, BATCHES, loss=lambda *given: loss(*given).mean())
    plans = [
        compress_params(model.params, stats, method="lord", keep=0.7, check=check)[1]
        for check in (True, False)
    ]
    assert plans[0] == plans[1]


@pytest.mark.full
def test_a_held_out_batch_that_is_not_finite_is_named():
    model = MODELS["unrolled"]()

    def bad(logits, ids):
        last = ids[0, 0] == BATCHES[-1][0, 0]
        return jnp.where(last, jnp.nan, 1) * loss(logits, ids)

    distinct = [ids for ids in BATCHES[:-1] if ids[0, 0] != BATCHES[-1][0, 0]]
    stats = collect(model.apply, model.params, [*distinct * 2, BATCHES[-1]], loss=bad)
    with pytest.raises(ValueError, match="the loss of the last 1 batches, which are held out"):
        compress_params(model.params, stats, method="lord", keep=0.7)


def test_blocks_end_where_a_kind_of_site_comes_again():
    model = MODELS["unrolled"]()
    table = find_sites(model.apply, model.params, BATCHES[0])
    modules = {module.name: module for module in table.modules}
    names = [*modules, *(p for p in table.names() if not p.endswith(("gate", "up", "down")))]
    found = places_of(names, modules, table)
    for path, place in found.items():
        if path.startswith("blocks/"):
            assert place.block == int(path.split("/")[1])
            assert place.group == ("mlp" if path in modules else "linear")
            assert place.kind == "blocks/#" + path[len("blocks/0") :]
    assert found["head"].block == max(place.block for place in found.values())
