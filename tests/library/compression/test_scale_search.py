"""Whether scales are searched: chosen by the predictions of models quantized in both ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interrupted import CONFIG, TOKENS, small_model

from lordjax.compression.measured import scale_search
from lordjax.compression.measured.held_out import group_of
from lordjax.compression.measured.scale_search import (
    GROUPS,
    MARGIN,
    MEASURED,
    SEQUENCES,
    measured_blocks,
)
from lordjax.compression.quantized import prepare_quantized
from lordjax.kernels import normal_float, trees
from lordjax.kernels.base import materialize
from lordjax.models import Transformer
from lordjax.models.sites import LINEAR_SITES
from lordjax.storage.store import MemoryStore

NF4 = normal_float.Format.parse("nf4")


def prepared(tokens=TOKENS, **options):
    how = {"method": "nf", "weighting": "both", **options}
    return prepare_quantized(small_model(), tokens, **how)


def quantized(params, searched):
    """The model with the MLPs of the measured blocks quantized, with or without a search."""
    ready = prepared()
    ready.__dict__["searches"] = frozenset({MEASURED} if searched else ())
    coded = trees.flatten(ready.apply(ready.uniform(NF4)).params)
    flat = dict(trees.flatten(params))
    for i in measured_blocks(CONFIG.num_layers):
        for site in LINEAR_SITES:
            path = f"layer_{i}/{site.path}"
            if path in flat and group_of(path) == MEASURED:
                flat[path] = materialize(coded[path])
    return trees.unflatten(flat)


def log_probabilities(params, tokens):
    with jax.default_matmul_precision("highest"):
        logits = Transformer(CONFIG).apply({"params": params}, tokens)
    return np.asarray(jax.nn.log_softmax(logits)[:, :-1], np.float64)


def test_measured_divergences_are_those_of_whole_models():
    ready, params = prepared(), small_model().params
    assert ready.searches <= set(GROUPS)
    found = ready.report["scales"]
    rows = np.linspace(0, len(TOKENS) - 1, SEQUENCES).round().astype(int)
    dense = log_probabilities(params, TOKENS[rows])
    for name, searched in (("divergence", False), ("divergence_searched", True)):
        own = log_probabilities(quantized(params, searched), TOKENS[rows])
        expected = np.mean(np.sum(np.exp(dense) * (dense - own), axis=-1))
        assert found[name] == pytest.approx(expected, rel=1e-3)
    assert found["divergence"] != found["divergence_searched"]
    assert ready.report["seconds"]["scales"] > 0


@pytest.mark.parametrize(("share", "chosen"), [(MARGIN - 0.01, True), (MARGIN + 0.01, False)])
def test_a_search_has_to_be_better_by_a_margin(monkeypatch, share, chosen):
    monkeypatch.setattr(scale_search, "_measured", lambda _: [2.0, 2.0 * share])
    ready = prepared()
    assert ready.searches == ({"attention", "mlp"} if chosen else {"attention"})
    assert ready.apply(ready.uniform(NF4)).report["scales"]["searched"] is chosen


def test_without_a_search_scales_are_the_largest_magnitudes(monkeypatch):
    monkeypatch.setattr(scale_search, "_measured", lambda _: [1.0, 1.0])
    ready, flat = prepared(), trees.flatten(small_model().params)
    made = trees.flatten(ready.apply(ready.uniform(NF4)).params)
    for path in ready.shapes:
        if group_of(path) != MEASURED:
            continue
        values = jnp.asarray(flat[path]).T.reshape(-1)
        expected = normal_float.quantize_scales(normal_float.block_scales(values, NF4.block), NF4)
        kernel = made[path]
        own = normal_float.unpack(kernel.scales, NF4.scale_bits, len(expected[0]))
        np.testing.assert_array_equal(own, expected[0])


@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (TOKENS[: scale_search.LEAST_SEQUENCES - 1], {}),
        (TOKENS, {"feedback": False}),
        (None, {"weighting": "none"}),
    ],
)
def test_nothing_is_measured_where_there_is_little_data_or_no_search(monkeypatch, tokens, options):
    monkeypatch.setattr(scale_search, "_measured", lambda _: pytest.fail("measured"))
    ready = prepared(tokens, **options)
    assert ready.searches == set(GROUPS)
    assert "scales" not in ready.report


def test_a_choice_that_is_kept_is_not_measured_again(monkeypatch):
    store = MemoryStore()
    first = prepared(work=store)
    expected, scales = first.searches, first.report["scales"]
    monkeypatch.setattr(scale_search, "_measured", lambda _: pytest.fail("measured again"))
    again = dataclasses.replace(first, report={"seconds": {}})
    assert again.searches == expected
    assert again.report["scales"] == scales
