"""Predicted losses are checked on held-out sequences, and corrected by what is measured there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import CONFIG, TOKENS, small_model

from lordjax.allocation.plan import Plan
from lordjax.compression import held_out
from lordjax.compression.held_out import Correction, checked_blocks, group_of, summary, warning
from lordjax.compression.low_rank import HELD_OUT, LEAST_CHECKED, held_out_count, prepare
from lordjax.compression.variants import compare
from lordjax.models import Transformer
from lordjax.runtime.progress import Clock

# --- losses ---------------------------------------------------------------------------------------


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


def test_a_clear_difference_is_its_mean_and_another_half_its_mean_square():
    rng = np.random.default_rng(0)
    clear, noise = 0.3 + rng.normal(size=900), rng.normal(size=900)
    noise -= noise.mean() - 0.01
    assert held_out._loss(clear) == clear.mean()
    for differences in (noise, clear - 0.6):  # gains are noise, too
        assert held_out._loss(differences) == np.mean(differences**2) / 2
    assert held_out._loss(np.zeros(5)) == 0


def test_half_the_mean_square_is_the_divergence_with_less_noise():
    """For targets that the original model draws itself, and a small change of it."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=20)
    other = logits + 0.05 * rng.normal(size=20)
    log_p, log_q = (a - np.log(np.exp(a).sum()) for a in (logits, other))
    divergence = np.exp(log_p) @ (log_p - log_q)
    found = []
    for _ in range(200):
        targets = rng.choice(20, 500, p=np.exp(log_p))
        differences = (log_p - log_q)[targets]
        found.append((held_out._loss(differences), differences.mean()))
    ours, means = np.array(found).T
    assert np.mean(ours) == pytest.approx(divergence, rel=0.05)
    assert np.std(ours) < 0.2 * np.std(means)


# --- corrections ----------------------------------------------------------------------------------


def row(layer, predicted, ratio, group="mlp", sites=("mlp",), shares=(1.0,)):
    """Returns what was measured of some sites with some shares of the predicted loss."""
    own = {"layer": layer, "group": group, "predicted": predicted, "ratio": ratio}
    shares = zip(sites, shares, strict=True)
    parts = {f"layer_{layer}/{site}": share * predicted for site, share in shares}
    return own | {"measured": predicted * ratio, "parts": parts, "trust": 1.0}


PREDICTED = np.array([2.0, 1.0, 0.5, 0.25, 0.1, 0.0])


def test_corrected_errors_are_those_that_were_measured():
    found = Correction([row(3, 0.1, 4.0), row(3, 1.0, 2.0)]).errors(
        "layer_3/mlp", PREDICTED, PREDICTED
    )
    assert found[1] == pytest.approx(2.0)
    assert found[4] == pytest.approx(0.4)
    # Between the two the ratio is a power of the prediction, beyond them constant.
    exponent = np.log(2 / 4) / np.log(1 / 0.1)
    assert found[3] == pytest.approx(0.25 * 4 * (0.25 / 0.1) ** exponent)
    assert found[0] == pytest.approx(4.0)
    assert found[5] == 0


def test_between_two_blocks_the_ratio_is_their_geometric_mean():
    correction = Correction([row(2, 1.0, 9.0), row(6, 1.0, 1.0)])
    for layer, ratio in ((0, 9), (2, 9), (3, 9**0.75), (4, 3), (6, 1), (8, 1)):
        found = correction.errors(f"layer_{layer}/mlp", PREDICTED, PREDICTED)
        np.testing.assert_allclose(found, ratio * PREDICTED)


def test_errors_that_nothing_was_measured_of_stay():
    correction = Correction([row(2, 1.0, 9.0), row(2, 0.0, 1.0, "attention/qk", ["attention/qk"])])
    for path in ("layer_2/attention/q/kernel", "layer_2/attention/qk"):
        np.testing.assert_array_equal(correction.errors(path, PREDICTED, PREDICTED), PREDICTED)
    np.testing.assert_array_equal(
        Correction([]).errors("layer_2/mlp", PREDICTED, PREDICTED), PREDICTED
    )


def test_sites_that_were_measured_together_have_the_measured_loss_together():
    """Whatever their shares of the predicted loss are."""
    sites = ("mlp/up/kernel", "mlp/down/kernel")
    rows = [row(1, 2.0, 0.5, "mlp", sites, (0.1, 0.9)), row(1, 1.0, 3.0, "mlp", sites, (0.5, 0.5))]
    correction = Correction(rows)
    curves = {"up": np.array([0.7, 0.5, 0.2]), "down": np.array([1.8, 0.9, 0.5])}
    found = {n: correction.errors(f"layer_1/mlp/{n}/kernel", c, c) for n, c in curves.items()}
    assert found["up"][1] + found["down"][2] == pytest.approx(3.0)


def test_errors_lie_where_the_measured_losses_do():
    """Between the in-sample and the cross-fitted errors, on a logarithmic scale."""
    chosen = [
        held_out.Point(
            i, "mlp", {f"layer_{i}/mlp": 2}, {f"layer_{i}/mlp": 1.0}, {f"layer_{i}/mlp": 4.0}
        )
        for i in range(3)
    ]
    for losses, share in (([2, 2, 9], 0.5), ([1, 0.5, 4], 0), ([5, 9, 1], 1), ([0, 0, 2], 0.5)):
        assert held_out._trust(chosen, losses)["mlp"] == pytest.approx(share)
    rows = [row(0, 0.1, 1.0) | {"trust": 0.5}]
    found = Correction(rows).errors("layer_0/mlp", PREDICTED, 4 * PREDICTED)
    np.testing.assert_allclose(found, 2 * PREDICTED)


def test_corrected_errors_never_grow_with_the_rank():
    correction = Correction([row(0, 0.1, 900.0), row(0, 1.0, 0.02)])
    found = correction.errors("layer_0/mlp", PREDICTED, PREDICTED)
    assert (np.diff(found) <= 0).all()
    assert found[4] == pytest.approx(90)
    assert found[0] == found[1] == found[4]  # what was measured there is no better offer


def test_groups_are_what_is_compressed_together():
    for path, group in {
        "layer_12/mlp": "mlp",
        "layer_0/mlp/up/kernel": "mlp",
        "layer_0/attention/q/kernel": "attention",
        "layer_3/attention/qk": "attention/qk",
        "layer_3/attention/vo": "attention/vo",
    }.items():
        assert group_of(path) == group


@pytest.mark.parametrize(
    ("layers", "others"),
    [(1, []), (2, []), (4, []), (5, [0]), (6, [0, 1]), (30, [0, 12, 25])],
)
def test_the_last_blocks_are_checked_and_some_others(layers, others):
    found = checked_blocks(layers)
    last = [i for i, fractions in found.items() if fractions == held_out.LAST_KEPT]
    assert last == list(range(max(0, layers - 4), layers))
    assert sorted(set(found) - set(last)) == others
    assert all(found[i] == held_out.OTHER_KEPT for i in others)


def test_a_warning_names_the_sites_that_are_far_off():
    near = [row(0, 0.1, 2.9), row(1, 0.1, 0.02, "attention")]
    assert warning(near) is None
    text = warning([*near, row(3, 0.01, 5.0), row(3, 0.02, 4.0), row(4, 0.001, 80.0, "attention")])
    assert "layer_3/mlp, layer_4/attention;" in text
    assert "worst at layer_4: 0.0800 nats, predicted 0.0010" in text
    assert "layer_0" not in text and "layer_1" not in text


def test_a_summary_tells_single_blocks_from_the_plan():
    rows = [row(0, 0.1, 2.0), row(3, 0.1, 0.5), row(None, 0.2, 1.5, "model", (), ())]
    assert summary(rows).endswith("is 0.50 to 2.00 of single blocks, 1.50 of a whole plan")
    assert summary(rows[:2]).endswith("is 0.50 to 2.00 of single blocks")
    assert Correction(rows).whole == 1.5 and Correction(rows[:2]).whole == 1
    assert warning([row(None, 0.2, 9.0, "model", (), ())]) is None  # no site is to blame


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
        measured = held_out._loss(losses(new, tokens) - dense)
        assert point["measured"] == pytest.approx(measured, rel=1e-3)
        seen = sum(in_sample[path].errors[rank] for path, rank in ranks.items())
        assert point["in_sample"] == pytest.approx(seen)
        # What was measured is predicted from then on.
        corrected = sum(curves[path].errors[rank] for path, rank in ranks.items())
        assert corrected == pytest.approx(point["ratio"] * point["predicted"])


def test_a_plan_is_measured_as_a_whole(prepared):
    """What a plan of the same budget loses on the held-out sequences is predicted from then on."""
    row, tokens = prepared.checked[-1], prepared.held_out
    result = prepared.compress(held_out.WHOLE_KEPT)
    planned = {path: rank for path, rank in result.plan.ranks.items() if rank is not None}
    assert row["layer"] is None and row["ranks"] == planned
    dense = losses(small_model().params, tokens)
    measured = held_out._loss(losses(result.params, tokens) - dense)
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
    assert all(held_out.LEAST <= point["ratio"] <= held_out.MOST for point in found)
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
