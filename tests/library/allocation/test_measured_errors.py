"""Predicted errors are corrected by measured losses."""

import numpy as np
import pytest

from lordjax.allocation import measured_errors
from lordjax.allocation.measured_errors import checked_blocks, summary, warning
from lordjax.compression.measured.held_out import places_of


class Anywhere(dict):
    """The places of all paths of our own models."""

    def __missing__(self, path):
        return places_of([path])[path]


def corrected_by(rows):
    return measured_errors.Correction(rows, Anywhere())


# --- losses ---------------------------------------------------------------------------------------


def test_a_clear_difference_is_its_mean_and_another_half_its_mean_square():
    rng = np.random.default_rng(0)
    clear, noise = 0.3 + rng.normal(size=900), rng.normal(size=900)
    noise -= noise.mean() - 0.01
    assert measured_errors.mean_loss(clear) == clear.mean()
    for differences in (noise, clear - 0.6):  # gains are noise, too
        assert measured_errors.mean_loss(differences) == np.mean(differences**2) / 2
    assert measured_errors.mean_loss(np.zeros(5)) == 0


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
        found.append((measured_errors.mean_loss(differences), differences.mean()))
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
    found = corrected_by([row(3, 0.1, 4.0), row(3, 1.0, 2.0)]).errors(
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
    correction = corrected_by([row(2, 1.0, 9.0), row(6, 1.0, 1.0)])
    for layer, ratio in ((0, 9), (2, 9), (3, 9**0.75), (4, 3), (6, 1), (8, 1)):
        found = correction.errors(f"layer_{layer}/mlp", PREDICTED, PREDICTED)
        np.testing.assert_allclose(found, ratio * PREDICTED)


def test_errors_that_nothing_was_measured_of_stay():
    correction = corrected_by(
        [row(2, 1.0, 9.0), row(2, 0.0, 1.0, "attention/qk", ["attention/qk"])]
    )
    for path in ("layer_2/attention/q/kernel", "layer_2/attention/qk"):
        np.testing.assert_array_equal(correction.errors(path, PREDICTED, PREDICTED), PREDICTED)
    np.testing.assert_array_equal(
        corrected_by([]).errors("layer_2/mlp", PREDICTED, PREDICTED), PREDICTED
    )


def test_sites_that_were_measured_together_have_the_measured_loss_together():
    """Whatever their shares of the predicted loss are."""
    sites = ("mlp/up/kernel", "mlp/down/kernel")
    rows = [row(1, 2.0, 0.5, "mlp", sites, (0.1, 0.9)), row(1, 1.0, 3.0, "mlp", sites, (0.5, 0.5))]
    correction = corrected_by(rows)
    curves = {"up": np.array([0.7, 0.5, 0.2]), "down": np.array([1.8, 0.9, 0.5])}
    found = {n: correction.errors(f"layer_1/mlp/{n}/kernel", c, c) for n, c in curves.items()}
    assert found["up"][1] + found["down"][2] == pytest.approx(3.0)


def test_errors_lie_where_the_measured_losses_do():
    """Between the in-sample and the cross-fitted errors, on a logarithmic scale."""
    chosen = [
        measured_errors.Point(
            i, "mlp", {f"layer_{i}/mlp": 2}, {f"layer_{i}/mlp": 1.0}, {f"layer_{i}/mlp": 4.0}
        )
        for i in range(3)
    ]
    for losses, share in (([2, 2, 9], 0.5), ([1, 0.5, 4], 0), ([5, 9, 1], 1), ([0, 0, 2], 0.5)):
        assert measured_errors._trust(chosen, losses)["mlp"] == pytest.approx(share)
    rows = [row(0, 0.1, 1.0) | {"trust": 0.5}]
    found = corrected_by(rows).errors("layer_0/mlp", PREDICTED, 4 * PREDICTED)
    np.testing.assert_allclose(found, 2 * PREDICTED)


def test_corrected_errors_never_grow_with_the_rank():
    correction = corrected_by([row(0, 0.1, 900.0), row(0, 1.0, 0.02)])
    found = correction.errors("layer_0/mlp", PREDICTED, PREDICTED)
    assert (np.diff(found) <= 0).all()
    assert found[4] == pytest.approx(90)
    assert found[0] == found[1] == found[4]  # what was measured there is no better offer


@pytest.mark.parametrize(
    ("layers", "others"),
    [(1, []), (2, []), (4, []), (5, [0]), (6, [0, 1]), (30, [0, 12, 25])],
)
def test_the_last_blocks_are_checked_and_some_others(layers, others):
    found = checked_blocks(layers)
    last = [i for i, fractions in found.items() if fractions == measured_errors.LAST_KEPT]
    assert last == list(range(max(0, layers - 4), layers))
    assert sorted(set(found) - set(last)) == others
    assert all(found[i] == measured_errors.OTHER_KEPT for i in others)


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
    assert corrected_by(rows).whole == 1.5 and corrected_by(rows[:2]).whole == 1
    assert warning([row(None, 0.2, 9.0, "model", (), ())]) is None  # no site is to blame
