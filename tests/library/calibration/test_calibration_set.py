"""Folds of the calibration set: no batch has sequences of two, and together they are the set."""

import dataclasses

import jax
import numpy as np
import pytest
from blocks import SMALL, shifted

from lordjax.calibration.backward_pass import gradient_statistics, site_gradients, site_total
from lordjax.calibration.calibration_set import Calibration
from lordjax.calibration.forward_pass import activation_keys, block_statistics, hidden_states
from lordjax.calibration.statistics import merged
from lordjax.compression.low_rank import InMemory, prepare
from lordjax.methods import METHODS
from lordjax.models.sites import sites_for
from lordjax.runtime.mesh import make_mesh
from lordjax.runtime.progress import Clock

SETS = [(2, 1), (3, 8), (8, 3), (14, 8), (15, 4), (16, 8), (31, 5)]  # sequences, batch size


def numbered(count, batch_size, devices=None, masked=False):
    """Returns a set whose sequence k holds the number k, and a mask that tells them apart, too."""
    tokens = np.repeat(np.arange(count, dtype=np.int32)[:, None], 5, axis=1)
    mask = np.arange(5)[None] < 1 + tokens[:, :1] % 5 if masked else None
    mesh = None if devices is None else make_mesh({"data": devices})
    return Calibration(tokens, mask, batch_size, mesh=mesh)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), SETS)
def test_no_batch_has_sequences_of_two_folds(count, batch_size, masked):
    whole = numbered(count, batch_size, masked=masked)
    found = whole.split()
    assert found.num_folds == 2 and whole.num_folds == 1
    batches, folds = list(found.batches()), found.batch_folds()
    assert len(batches) == len(folds) == len(found.masks())
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in batches]), whole.tokens)
    for (tokens, mask), fold in zip(batches, folds, strict=True):
        assert (found.folds[tokens[:, 0]] == fold).all()
        assert 0 < len(tokens) <= batch_size
        if masked:
            np.testing.assert_array_equal(mask, whole.mask[tokens[:, 0]])
    # Both folds have sequences, in order. The last batch of a fold may be a shorter one.
    assert sorted(set(folds)) == [0, 1] and folds == sorted(folds)
    last = folds.index(1) - 1, len(folds) - 1
    whole = [len(tokens) for i, (tokens, _) in enumerate(batches) if i not in last]
    assert set(whole) <= {found.batch_size}


@pytest.mark.parametrize("count", [2, 7, 8, 14, 27])
def test_folds_are_halves_whatever_the_batches_and_devices_are(count):
    expected = np.repeat([0, 1], [count // 2, count - count // 2])
    for batch_size, devices in ((1, None), (3, None), (8, None), (8, 2), (8, 4), (16, 4)):
        found = numbered(count, batch_size, devices=devices).split()
        np.testing.assert_array_equal(found.folds, expected)
        sizes = [len(tokens) for tokens, _ in found.batches()]
        assert max(sizes) <= batch_size
        if count // 2 >= (devices or 1):  # devices share all batches but the last one of a fold
            assert sum(size % (devices or 1) > 0 for size in sizes) <= 2


def test_one_sequence_is_one_fold():
    given = numbered(1, 8)
    assert given.split() is given
    assert given.batch_folds() == [0]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 14, 99, None])
def test_a_selection_keeps_its_folds_and_has_both(count):
    whole = numbered(14, 4, masked=True).split()
    few = whole.spread(count)
    own = few.tokens[:, 0]
    assert len(own) == (14 if count is None else max(2, min(count, 14)))
    np.testing.assert_array_equal(few.folds, whole.folds[own])
    np.testing.assert_array_equal(few.mask, whole.mask[own])
    assert sorted(set(few.batch_folds())) == [0, 1]
    for (tokens, _), fold in zip(few.batches(), few.batch_folds(), strict=True):
        assert (whole.folds[tokens[:, 0]] == fold).all()


@pytest.mark.parametrize(("count", "asked", "held"), [(2, 2, 1), (8, 2, 1), (16, 2, 2), (40, 4, 4)])
def test_the_last_sequences_are_held_out(count, asked, held):
    given = numbered(count, 4, masked=True)
    kept, out = given.hold_out(asked)
    np.testing.assert_array_equal(out[:, 0], np.arange(count - held, count))
    np.testing.assert_array_equal(kept.tokens, given.tokens[: count - held])
    np.testing.assert_array_equal(kept.mask, given.mask[: count - held])
    assert kept.num_folds == 1
    again, _ = given.split().hold_out(asked)
    np.testing.assert_array_equal(again.folds, given.split().folds[: count - held])


# --- statistics of the folds ----------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, SMALL.vocab_size, (7, 20)).astype(np.int32)
METHOD = dataclasses.replace(
    METHODS["modegpt-cr"],
    factor=METHODS["svd"].factor,
    needs=("moments", "abs_mean", "gradients", "row_fisher", "fisher", "weighted_inputs"),
)


def statistics(calibration):
    """Returns every kind of statistic of the first block, of each fold."""
    source = InMemory(SMALL, shifted(SMALL))
    block, sites = source.block(0), sites_for(METHOD.kinds, SMALL)
    keys = activation_keys(block, sites, METHOD)
    states = hidden_states(source, calibration)
    given = block, 0, states, calibration, sites, keys, SMALL
    activations = block_statistics(*given, influence=True)
    return activations, gradient_statistics(source, calibration, METHOD, Clock())[0]


@pytest.mark.full
@pytest.mark.parametrize("masked", [False, True])
def test_folds_together_have_the_statistics_of_the_set(masked):
    mask = np.arange(20)[None] < np.arange(14, 21)[:, None] if masked else None
    whole = Calibration(TOKENS, mask, 4)
    for one, two in zip(statistics(whole), statistics(whole.split()), strict=True):
        assert len(one) == 1 and len(two) == 2

        def close(found, expected):
            scale = np.abs(expected).max()
            assert scale > 0
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * scale)

        jax.tree.map(close, merged(two), one[0])
        assert any(not np.allclose(*pair) for pair in zip(*map(jax.tree.leaves, two), strict=True))


@pytest.mark.full
def test_the_basis_of_gradients_is_no_sum():
    """The MLP of this model widens: its gradients are kept in coordinates."""
    calibration = Calibration(TOKENS, None, 4).split()
    source, method = InMemory(SMALL, shifted(SMALL)), METHODS["lord"]
    stats = gradient_statistics(source, calibration, method, Clock())[0]
    site = next(s for s in sites_for(method.kinds, SMALL) if s.path == "mlp/up/kernel")
    folds = site_gradients(stats, method, site, source.block(0)["mlp"]["up"]["kernel"])
    total = site_total(folds)
    assert total["basis"] is folds[0]["basis"]
    sums = [fold["gradients"].total for fold in folds]
    np.testing.assert_allclose(total["gradients"].total, sum(sums), rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("windows", [1, 2, None])
def test_factors_of_all_ranks_are_the_kernel(windows):
    """With two folds as with one: a widening kernel's factors have no other size."""
    source = InMemory(SMALL, shifted(SMALL))
    for tokens in (TOKENS, TOKENS[:1]):
        prepared = prepare(source, tokens, method="lord", gradient_windows=windows)
        for path in ("layer_0/mlp/up/kernel", "layer_1/attention/q/kernel"):
            factors, (layer, *inside) = prepared.factors[path], path.split("/")
            kernel = source.block(int(layer[6:]))
            for name in inside:
                kernel = kernel[name]
            product = factors.left @ factors.right
            # The kept ranks explain most of it, and the rest is not a multiple of it.
            share = np.vdot(product, kernel) / np.vdot(kernel, kernel)
            assert 0.5 < share < 1.001
