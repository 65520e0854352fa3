"""Predicted losses are checked on held-out sequences, and corrected by what is measured there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import CONFIG, TOKENS, small_model

from lordjax.allocation import measured_errors
from lordjax.allocation.plan import Plan
from lordjax.compression.low_rank import HELD_OUT, LEAST_CHECKED, held_out_count, prepare
from lordjax.compression.measured.held_out import group_of
from lordjax.compression.measured.variants import compare
from lordjax.models import Transformer
from lordjax.runtime.progress import Clock


def test_a_variant_runs_from_the_first_block_in_which_it_differs():
    seen = []

    def change(block, i, j):
        seen.append((j, i))
        return jax.tree.map(lambda a: 0.5 * a, block) if i == 2 else block

    given = small_model(), TOKENS[:2], change, [0, 2, 1], Clock()
    dense, *found = compare(*given, stage="held-out check")
    assert sorted(seen) == [(0, 0), (0, 1), (0, 2), (1, 2), (2, 1), (2, 2)]
    assert dense.shape == (2 * (TOKENS.shape[1] - 1),)
    for losses in found:
        np.testing.assert_array_equal(losses, found[0])
        assert not np.allclose(losses, dense, atol=1e-3)


def test_groups_are_what_is_compressed_together():
    for path, group in {
        "layer_12/mlp": "mlp",
        "layer_0/mlp/up/kernel": "mlp",
        "layer_0/attention/q/kernel": "attention",
        "layer_3/attention/qk": "attention/qk",
        "layer_3/attention/vo": "attention/vo",
    }.items():
        assert group_of(path) == group


# --- preparations ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared():
    return prepare(small_model(), TOKENS, method="modegpt")


def losses(params, tokens):
    says = jax.nn.log_softmax(Transformer(CONFIG).apply({"params": params}, tokens)[:, :-1])
    return -np.asarray(jnp.take_along_axis(says, tokens[:, 1:, None], -1))[..., 0].reshape(-1)


def test_measured_losses_are_those_of_whole_models(prepared):
    """With one group of sites compressed, on sequences that no statistic has seen."""
    tokens = prepared.held_out
    np.testing.assert_array_equal(tokens, TOKENS[-1:])
    np.testing.assert_array_equal(prepared.calibration.tokens, TOKENS[:-1])
    dense, nothing = losses(small_model().params, tokens), dict.fromkeys(prepared.sizes)
    curves, in_sample = prepared.curves(), prepared.curves(in_sample=True)
    *points, _ = prepared.checked
    assert len(points) == 3 * (3 + 1)  # blocks; MLPs of three widths and an attention
    for point in points:
        ranks, found = point["ranks"], {group_of(path) for path in point["ranks"]}
        assert found == {point["group"]}
        assert {int(path[6]) for path in ranks} == {point["layer"]}
        new = prepared.apply(Plan("modegpt", nothing | ranks, 0.5, "global")).params
        measured = measured_errors.mean_loss(losses(new, tokens) - dense)
        assert point["measured"] == pytest.approx(measured, rel=1e-3)
        seen = sum(in_sample[path].errors[rank] for path, rank in ranks.items())
        assert point["in_sample"] == pytest.approx(seen)
        # What was measured is predicted from then on.
        corrected = sum(curves[path].errors[rank] for path, rank in ranks.items())
        assert corrected == pytest.approx(point["ratio"] * point["predicted"])


def test_a_plan_is_measured_as_a_whole(prepared):
    """What a plan of the same budget loses on the held-out sequences is predicted from then on."""
    row, tokens = prepared.checked[-1], prepared.held_out
    result = prepared.compress(measured_errors.WHOLE_KEPT)
    planned = {path: rank for path, rank in result.plan.ranks.items() if rank is not None}
    assert row["layer"] is None and row["ranks"] == planned
    dense = losses(small_model().params, tokens)
    measured = measured_errors.mean_loss(losses(result.params, tokens) - dense)
    assert row["measured"] == pytest.approx(measured, rel=1e-3)
    assert result.plan.predicted["held_out"] == pytest.approx(row["ratio"] * row["predicted"])
    assert result.plan.predicted["in_sample"] == pytest.approx(row["in_sample"])


def test_predictions_are_in_plan_and_report(prepared):
    result, ratio = prepared.compress(0.6), prepared.checked[-1]["ratio"]
    ranks = result.plan.ranks.items()
    for name, in_sample, factor in (("in_sample", True, 1), ("held_out", False, ratio)):
        curves = prepared.curves(in_sample=in_sample)
        expected = sum(curves[path].errors[-1 if r is None else r] for path, r in ranks)
        assert result.plan.predicted[name] == pytest.approx(factor * expected)
    assert result.report["plan"]["predicted_nats"] == result.plan.predicted
    assert result.report["held_out_check"] == prepared.checked
    assert result.report["seconds"]["held-out check"] > 0
    assert result.report["calibration"]["held_out_windows"] == len(prepared.held_out)


@pytest.mark.full
@pytest.mark.parametrize("method", ["lord", "modegpt-cr"])
def test_every_group_of_a_method_is_checked(method):
    prepared = prepare(small_model(), TOKENS, method=method)
    found, curves = prepared.checked, prepared.curves()
    groups = {"lord": {"mlp", "attention"}, "modegpt-cr": {"mlp", "attention/vo", "attention/qk"}}
    assert {point["group"] for point in found} == groups[method] | {"model"}
    assert all(point["measured"] >= 0 for point in found)
    assert all(measured_errors.LEAST <= point["ratio"] <= measured_errors.MOST for point in found)
    for point in found[:-1]:  # more only where the loss of a larger rank is more
        corrected = sum(curves[path].errors[rank] for path, rank in point["ranks"].items())
        assert corrected >= point["ratio"] * point["predicted"] * (1 - 1e-6)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd", {}),
        ("lord-affine", {"allocation": "global"}),
        ("lord", {"allocation": "uniform"}),
        ("lord", {"prefix": "compressed"}),
        ("lord", {"mask": np.arange(16)[None] < np.full((12, 1), 14)}),
    ],
    ids=["svd", "other units", "uniform", "sequential", "padded"],
)
def test_where_nothing_is_checked_nothing_is_held_out(method, options):
    found = prepare(small_model(), TOKENS, method=method, **options)
    assert not found.checked and not len(found.held_out)
    assert len(found.calibration.tokens) == len(TOKENS)
    report = found.compress(0.6).report
    assert "held_out_check" not in report
    assert "held-out check" not in report["seconds"]


@pytest.mark.full
def test_few_sequences_are_all_read():
    few = prepare(small_model(), TOKENS[: LEAST_CHECKED - 1], method="lord")
    assert not few.checked and len(few.calibration.tokens) == LEAST_CHECKED - 1
    assert len(prepare(small_model(), TOKENS[:LEAST_CHECKED], method="lord").held_out) == 1
    for sequences, expected in ((16 * HELD_OUT - 1, 1), (16 * HELD_OUT, HELD_OUT)):
        assert held_out_count("lord", "global", "dense", sequences) == expected


@pytest.mark.full
@pytest.mark.parametrize("method", ["lord", "modegpt-cr", "lord-affine"])
def test_errors_on_unseen_tokens_are_between_those_of_the_folds_and_of_the_fit(method):
    """A third of the error on seen tokens and two thirds of the cross-fitted one."""
    given = {"method": method, "allocation": "global"}
    two, one = (prepare(small_model(), TOKENS[:n], **given) for n in (6, 1))
    scale = dict.fromkeys(two.factors, 1.0)
    fitted, found = two.curves(in_sample=True), two.curves()
    if not two.definition.in_nats:  # errors of a site are relative to the whole
        scale = {p: sum(np.asarray(f.spectrum, float)) for p, f in two.factors.items()}
    for path, factors in two.factors.items():
        seen, cross = fitted[path].errors * scale[path], np.asarray(factors.held_out, float)
        mixed = np.maximum.accumulate(((seen + 2 * cross) / 3)[::-1])[::-1]
        if not two.definition.in_nats:
            mixed /= mixed[0]
        np.testing.assert_allclose(found[path].errors, mixed, rtol=1e-5, atol=1e-9)
    assert all(factors.held_out is None for factors in one.factors.values())
    for path, curve in one.curves().items():
        np.testing.assert_array_equal(curve.errors, one.curves(in_sample=True)[path].errors)
