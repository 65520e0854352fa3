"""Block influence: fractions of LLaMA, optimality, and budgets that hold after rounding."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import spent

from lordjax.allocation.block_influence import influence_removal
from lordjax.allocation.curves import Curve
from lordjax.allocation.plan import SiteSize
from lordjax.allocation.policies import allocate
from lordjax.compression.site_factors import site_size
from lordjax.models import ModelConfig, init
from lordjax.models.sites import MODULE_SITES

# LLaMA-2-7B's scores (theory/modegpt §5.4), layers 0 to 31.
LLAMA_INFLUENCE = np.array(
    [
        *(0.370, 0.255, 0.152, 0.154, 0.154, 0.154, 0.152, 0.151),
        *(0.143, 0.134, 0.128, 0.115, 0.111, 0.111, 0.107, 0.108),
        *(0.107, 0.087, 0.075, 0.064, 0.064, 0.049, 0.048, 0.039),
        *(0.037, 0.039, 0.036, 0.033, 0.036, 0.038, 0.060, 0.297),
    ]
)


def test_influence_of_llama():
    plain = influence_removal(LLAMA_INFLUENCE, 0.3, 0.1, cap=1.0)
    assert plain.min() == pytest.approx(0.018, abs=1e-3)
    assert plain.max() == pytest.approx(0.539, abs=1e-3)
    for cap, capped in ((1.0, 9), (0.85, 12)):
        pinned = influence_removal(LLAMA_INFLUENCE, 0.5, 0.05, cap=cap)
        assert np.sum(pinned == cap) == capped
        assert pinned.mean() == pytest.approx(0.5, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=20),
    st.floats(0, 0.95),
    st.floats(1e-3, 10),
    st.integers(0, 2**32 - 1),
)
def test_influence_is_the_capped_optimum(scores, removed, temperature, seed):
    scores = np.array(scores)
    shares = influence_removal(scores, removed, temperature)
    assert shares.mean() == pytest.approx(removed, abs=1e-9)
    assert ((shares >= 0) & (shares <= 0.95 + 1e-12)).all()
    order = np.argsort(scores)
    assert (np.diff(shares[order]) <= 1e-12).all()  # little is removed where the influence is high

    def value(phi):
        logs = np.log(np.where(phi > 0, phi, 1))
        return np.sum(scores * (1 - phi)) - temperature * np.sum(phi * logs)

    rng = np.random.default_rng(seed)
    for _ in range(20):  # no feasible exchange between two blocks is better
        i, j = rng.integers(0, len(scores), 2)
        other = shares.copy()
        step = rng.uniform(0, min(other[i], 0.95 - other[j]))
        other[i] -= step
        other[j] += step
        assert value(other) <= value(shares) + 1e-9


def test_influence_limits():
    scores = np.array([0.1, 0.5, 0.2])
    np.testing.assert_allclose(influence_removal(scores, 0.4, float("inf")), 0.4)
    np.testing.assert_allclose(influence_removal(np.ones(4), 0.4, 0.1), 0.4)
    np.testing.assert_allclose(influence_removal(scores, 0.0, 0.1), 0.0)
    with pytest.raises(ValueError, match="cap"):
        influence_removal(scores, 0.96, 0.1)
    with pytest.raises(ValueError, match="temperature"):
        influence_removal(scores, 0.5, 0.0)


def test_influence_of_blocks_too_far_apart_to_compare():
    np.testing.assert_allclose(influence_removal(np.array([0.0, 2.0]), 0.9, 1e-3), [0.95, 0.85])


def test_rounding_by_influence_is_repaired_within_the_budget():
    """MoDeGPT's modules of LLaMA-2-7B: widths suit hardware, within 0.2 % of the target."""
    errors = {"attention/qk": 128, "attention/vo": 128, "mlp": 11008}
    sizes = {
        "attention/qk": SiteSize(2 * 4096**2, 2 * 4096 * 32, step=2),
        "attention/vo": SiteSize(2 * 4096**2, 2 * 4096 * 32),
        "mlp": SiteSize(3 * 4096 * 11008, 3 * 4096, tiles=16),
    }
    curves = {
        f"layer_{i}/{name}": Curve(sizes[name], np.linspace(1, 0, width + 1), 0, score)
        for i, score in enumerate(LLAMA_INFLUENCE)
        for name, width in errors.items()
    }
    dense = sum(curve.size.dense for curve in curves.values())
    for keep in (0.9, 0.7, 0.5):
        ranks, _ = allocate(curves, keep, "block-influence", 8, temperature=0.1)
        assert keep - 0.002 <= spent(curves, ranks) / dense <= keep
        assert all(
            r is None or r % (128 if p.endswith("mlp") else 8) == 0 for p, r in ranks.items()
        )


@pytest.mark.parametrize(
    ("removed", "temperature", "cap", "pinned"),
    [(0.3, 0.1, 1.0, 0), (0.5, 0.05, 1.0, 9), (0.5, 0.05, 0.85, 12)],
)
def test_influence_meets_the_kkt_conditions(removed, temperature, cap, pinned):
    """Σ sφ - T·H(φ) has one slope at all blocks below the cap, and a larger one at the cap."""
    phi = influence_removal(LLAMA_INFLUENCE, removed, temperature, cap=cap)
    slope = -LLAMA_INFLUENCE - temperature * (np.log(phi) + 1)
    at_cap = phi >= cap - 1e-12
    assert at_cap.sum() == pinned
    assert np.ptp(slope[~at_cap]) < 1e-9
    assert (slope[at_cap] >= slope[~at_cap].max() - 1e-9).all()


@pytest.mark.parametrize("policy", ["block-influence", "global"])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
def test_budget_of_llama_is_met_within_a_fifth_of_a_percent(policy, keep):
    config = ModelConfig(32_000, 4096, 11008, 1, 32, 32, 128, 4096)
    block = jax.eval_shape(lambda: init(config, jax.random.key(0)))["layer_0"]
    curves = {}
    for site in (site for site in MODULE_SITES if site.kind != "heads"):  # overlaps with two
        size = site_size(site, block, config)
        errors = np.exp(-4 * np.linspace(0, 1, int(size.limit) + 1))
        for i, score in enumerate(LLAMA_INFLUENCE):
            curves[f"layer_{i}/{site.path}"] = Curve(size, score * errors, 0, score)
    ranks, _ = allocate(curves, keep, policy, 8)
    dense = sum(curve.size.dense for curve in curves.values())
    assert keep - 0.002 <= spent(curves, ranks) / dense <= keep
    assert all(r is None or r % (32 if p.endswith("mlp") else 8) == 0 for p, r in ranks.items())
