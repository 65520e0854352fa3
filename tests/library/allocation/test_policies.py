"""Policies: published ranks and sizes, budgets, and properties that every policy has."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import spent

from lordjax.allocation.curves import Curve
from lordjax.allocation.knapsack import choose
from lordjax.allocation.plan import SiteSize
from lordjax.allocation.policies import CURVELESS, POLICIES, allocate

# --- published numbers: LLaMA-7B (theory/lord_rom §4.3, §7, §9) ----------------------------------

WIDTH, HIDDEN, BLOCKS, VOCAB = 4096, 11008, 32, 32_000

LLAMA = {
    "attention/q": (WIDTH, WIDTH),
    "attention/k": (WIDTH, WIDTH),
    "attention/v": (WIDTH, WIDTH),
    "attention/o": (WIDTH, WIDTH),
    "mlp/gate": (WIDTH, HIDDEN),
    "mlp/up": (WIDTH, HIDDEN),
    "mlp/down": (HIDDEN, WIDTH),
}

FLAT = np.zeros(WIDTH + 1)  # for policies that read shapes only

SHAPES = {f"layer_{i}/{n}/kernel": s for i in range(BLOCKS) for n, s in LLAMA.items()}

LLAMA_CURVES = {path: Curve(SiteSize.matrix(*shape), FLAT) for path, shape in SHAPES.items()}


def linear_weights(ranks):
    return sum(SiteSize.matrix(*SHAPES[path]).weights(rank) for path, rank in ranks.items())


def parameters(ranks):
    """Weights of linear layers, embedding, untied head, two norms per block and the final norm."""
    return linear_weights(ranks) + 2 * VOCAB * WIDTH + (2 * BLOCKS + 1) * WIDTH


def macs(ranks, length=64):
    """Multiply-adds of linear layers and head on every token, and of full attention."""
    return length * (linear_weights(ranks) + VOCAB * WIDTH) + BLOCKS * 2 * length**2 * WIDTH


ROM_TABLE = [  # keep, blocks, ratio inside, rank of square and of MLP matrices
    (0.9, 8, 0.60, 1228, 1791),
    (0.8, 12, 0.46, 942, 1373),
    (0.5, 24, 0.33, 675, 985),
]


@pytest.mark.parametrize(("keep", "k", "ratio", "square", "mlp"), ROM_TABLE)
def test_rom_ranks(keep, k, ratio, square, mlp):
    ranks, _ = allocate(LLAMA_CURVES, keep, "last-k")
    inside = [path for path in SHAPES if int(path.split("/")[0][6:]) >= BLOCKS - k]
    assert {path for path, rank in ranks.items() if rank is not None} == set(inside)
    for path in inside:
        assert ranks[path] == (square if "attention" in path else mlp)
    # Inside those blocks every kernel gets what the uniform policy gives at that ratio.
    uniform, _ = allocate(LLAMA_CURVES, ratio, "uniform")
    assert all(ranks[path] == uniform[path] for path in inside)


@pytest.mark.parametrize(
    ("keep", "giga_macs", "billions"),
    [(1.0, 423.93, 6.738), (0.9, None, 6.091), (0.8, 339.99, 5.427), (0.5, 215.61, 3.483)],
)
def test_rom_sizes_and_operations(keep, giga_macs, billions):
    ranks, _ = allocate(LLAMA_CURVES, keep, "last-k")
    assert f"{parameters(ranks) / 1e9:.3f}" == f"{billions:.3f}"
    if giga_macs is not None:
        assert f"{macs(ranks) / 1e9:.2f}" == f"{giga_macs:.2f}"


@pytest.mark.parametrize(
    ("keep_qk", "keep_rest", "expected", "billions"),
    [
        (0.7, 0.8, (1433, 1638, 2388), 5.4425),
        (0.55, 0.7, (1126, 1433, 2089), 4.7943),
    ],
)
def test_hand_set_lord_budgets(keep_qk, keep_rest, expected, billions):
    def subset(keep, *names):
        chosen = {p: c for p, c in LLAMA_CURVES.items() if p.split("/", 1)[1][:-7] in names}
        return allocate(chosen, keep, "uniform")[0]

    ranks = subset(1.0, "attention/v") | subset(keep_qk, "attention/q", "attention/k")
    ranks |= subset(keep_rest, "attention/o", "mlp/gate", "mlp/up", "mlp/down")
    found = tuple(ranks[f"layer_5/{n}/kernel"] for n in ("attention/q", "attention/o", "mlp/up"))
    assert found == expected
    assert f"{parameters(ranks) / 1e9:.4f}" == f"{billions:.4f}"


def test_break_even_ranks_of_starcoder():
    # theory/lord_rom §2.3: square 3072, fused multi-query attention 3134.7, MLP 4915.2.
    for shape, expected in [
        ((6144, 6144), 3072),
        ((6144, 6400), 3134.7),
        ((24576, 6144), 4915.2),
    ]:
        assert abs(Curve(SiteSize.matrix(*shape), FLAT).break_even - expected) < 0.05


# --- properties of every policy ------------------------------------------------------------------

TYPES = ("attention/q", "attention/o", "mlp/up")

SIZES = (1, 2, 5, 8, 16, 24, 40, 63)


@st.composite
def models(draw):
    """Curves of a small model: one shape per layer type, one falling spectrum per kernel."""
    layers = draw(st.integers(1, 5))
    shapes = {n: (draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))) for n in TYPES}
    bias = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    curves = {}
    for i, (name, shape) in itertools.product(range(layers), shapes.items()):
        # Some spectra are flat (ties), some fall by orders of magnitude, some vanish.
        decay = rng.choice([0.0, 0.1, 2.0])
        spectrum = rng.choice([0.0, 1.0, 1.0, 50.0]) * np.exp(-decay * np.arange(min(shape)))
        errors = np.append(np.cumsum(spectrum[::-1])[::-1], 0.0)
        curves[f"layer_{i}/{name}/kernel"] = Curve(
            SiteSize.matrix(*shape), errors, shape[1] if bias else 0
        )
    return curves


def try_allocate(curves, keep, policy, tile):
    """Ranks, or None if the policy says that the budget cannot be met."""
    try:
        return allocate(curves, keep, policy, tile)
    except ValueError as error:
        assert str(keep) in str(error) or "budget" in str(error)
        return None


@settings(max_examples=60, deadline=None)
@given(
    models(), st.floats(0.02, 0.999), st.sampled_from(sorted(POLICIES)), st.sampled_from([1, 4, 8])
)
def test_budget_tiles_and_break_even(curves, keep, policy, tile):
    found = try_allocate(curves, keep, policy, tile)
    if found is None:
        return
    ranks, gap = found
    assert ranks.keys() == curves.keys()
    dense = sum(curve.size.dense for curve in curves.values())
    assert spent(curves, ranks) <= keep * dense * (1 + 1e-12)
    assert gap is None or 0 <= gap <= 1
    for path, rank in ranks.items():
        if rank is None:
            continue
        one = {path: curves[path]}
        assert type(rank) is int and rank >= 1
        assert spent(one, {path: rank}) < spent(one, {path: None})  # below break-even
        if policy not in CURVELESS and rank % tile:
            # Only a matrix smaller than a tile may have another rank.
            assert spent(one, {path: tile}) >= spent(one, {path: None})
    assert allocate(dict(curves), keep, policy, tile) == found  # deterministic


@settings(max_examples=30, deadline=None)
@given(models(), st.floats(0.05, 0.999), st.sampled_from(sorted(POLICIES)))
def test_a_budget_that_fits_the_smallest_ranks_is_met(curves, keep, policy):
    """The optimizing policies refuse only impossible budgets."""
    least = 0
    for curve in curves.values():
        smallest = {"k": 1}
        pair, dense = spent({"k": curve}, smallest), curve.size.dense
        least += min(pair, dense)
    total = sum(curve.size.dense for curve in curves.values())
    if policy in ("global", "energy", "per-type"):
        assert (try_allocate(curves, keep, policy, 1) is not None) == (least <= keep * total)


@settings(max_examples=40, deadline=None)
@given(models(), st.floats(0.1, 0.9), st.floats(0.0, 1.0))
def test_more_budget_is_never_certified_worse(curves, keep, more):
    options = [curve.candidates(4) for curve in curves.values()]
    costs, errors = [o[1] for o in options], [o[2] for o in options]
    dense = sum(curve.size.dense for curve in curves.values())
    small, large = keep * dense, (keep + more * (1 - keep)) * dense
    if sum(c[0] for c in costs) > small:
        return
    first, second = choose(costs, errors, small), choose(costs, errors, large)
    slack = 1e-9 * (1 + first.error)
    assert second.bound <= first.bound + slack
    assert second.error <= first.error + second.gap * second.error + slack


@settings(max_examples=20, deadline=None)
@given(models(), st.sampled_from(sorted(POLICIES)))
def test_keeping_everything_changes_nothing(curves, policy):
    ranks, _ = allocate(curves, 1.0, policy)
    assert ranks == dict.fromkeys(curves, None)


# --- policies ------------------------------------------------------------------------------------


def curve(spectrum, shape=(32, 32), extra=0):
    return Curve(SiteSize.matrix(*shape), np.append(np.cumsum(spectrum[::-1])[::-1], 0.0), extra)


def two_layers():
    falling = 2.0 ** -np.arange(32)
    return {
        "layer_0/mlp/up/kernel": curve(falling),
        "layer_0/mlp/down/kernel": curve(np.ones(32)),
        "layer_1/mlp/up/kernel": curve(falling * 3),
        "layer_1/mlp/down/kernel": curve(np.ones(32) / 2),
    }


def test_per_type_gives_one_rank_a_layer_type():
    ranks, gap = allocate(two_layers(), 0.6, "per-type", tile=2)
    assert ranks["layer_0/mlp/up/kernel"] == ranks["layer_1/mlp/up/kernel"]
    assert ranks["layer_0/mlp/down/kernel"] == ranks["layer_1/mlp/down/kernel"]
    assert gap is not None
    # A spectrum that falls fast needs a smaller rank than a flat one.
    assert ranks["layer_0/mlp/up/kernel"] is not None
    assert ranks["layer_0/mlp/down/kernel"] is None or (
        ranks["layer_0/mlp/down/kernel"] > ranks["layer_0/mlp/up/kernel"]
    )


def test_energy_equalises_the_share_that_is_kept():
    curves = {
        f"layer_{i}/mlp/up/kernel": curve(np.exp(-decay * np.arange(32)))
        for i, decay in enumerate((0.3, 0.6, 1.2))
    }
    ranks, _ = allocate(curves, 0.5, "energy", tile=1)
    kept, one_less = [], []
    for path, rank in ranks.items():
        errors = curves[path].errors
        kept.append(1 - errors[rank] / errors[0])
        one_less.append(1 - errors[rank - 1] / errors[0])
    # One threshold separates what every kernel keeps at its rank from what it keeps at one less.
    assert max(one_less) < min(kept)
    found = list(ranks.values())
    assert found == sorted(found, reverse=True) and len(set(found)) == 3


def test_global_prefers_the_kernel_that_hurts_more():
    flat = np.ones(32)
    curves = {"layer_0/a/kernel": curve(flat), "layer_1/a/kernel": curve(10 * flat)}
    ranks, gap = allocate(curves, 0.7, "global", tile=2)
    error = sum(0 if r is None else curves[p].errors[r] for p, r in ranks.items())
    worse = dict(zip(ranks, reversed(ranks.values()), strict=True))
    assert error < sum(0 if r is None else curves[p].errors[r] for p, r in worse.items())
    assert gap is not None


@pytest.mark.parametrize("policy", ["uniform", "global", "per-type", "energy"])
def test_bias_weights_are_counted(policy):
    without = {f"layer_{i}/mlp/up/kernel": curve(np.ones(32)) for i in range(3)}
    bias = {path: dataclasses.replace(c, extra=40) for path, c in without.items()}
    keep = 0.5  # rank 8 exactly, without a bias
    assert spent(without, allocate(without, keep, policy, 1)[0]) == keep * 3 * 32 * 32
    ranks, _ = allocate(bias, keep, policy, 1)
    assert spent(bias, ranks) <= keep * 3 * 32 * 32
    assert sum(r is not None for r in ranks.values()) > 0


def test_blocks_of_different_sizes_keep_the_budget():
    # The last blocks are small, so their savings count in weights, not in blocks.
    curves = {f"layer_{i}/mlp/up/kernel": curve(np.ones(32)) for i in range(1, 4)}
    curves["layer_0/mlp/up/kernel"] = curve(np.ones(40), (40, 40))
    for keep in (0.5, 0.7, 0.9):
        ranks, _ = allocate(curves, keep, "last-k")
        assert spent(curves, ranks) <= keep * (3 * 32 * 32 + 40 * 40)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_matrices_too_small_to_factor_stay_dense(policy):
    # Rank 1 of a vector is larger than the vector.
    curves = two_layers()
    curves |= {f"layer_{i}/attention/q/kernel": curve(np.ones(1), (1, 16)) for i in range(2)}
    ranks, _ = allocate(curves, 0.6, policy)
    assert all(ranks[f"layer_{i}/attention/q/kernel"] is None for i in range(2))
    assert any(rank is not None for rank in ranks.values())


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_stays_is_paid_for_by_the_others(policy):
    curves = two_layers()
    weights = sum(c.size.dense for c in curves.values())
    curves = {
        "layer_0/attention/q/kernel": Curve(SiteSize(weights, weights), np.zeros(2)),
        **curves,
    }
    ranks, _ = allocate(curves, 0.7, policy, 1)
    assert list(ranks) == list(curves)
    assert ranks["layer_0/attention/q/kernel"] is None
    assert 0.65 * 2 * weights < spent(curves, ranks) <= 0.7 * 2 * weights
    with pytest.raises(ValueError, match=r"0\.5 of the weights are in layers that this method"):
        allocate(curves, 0.4, policy, 1)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_keep_out_of_range(keep, policy):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        allocate(two_layers(), keep, policy)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_budget_that_cannot_be_met_says_so(policy):
    with pytest.raises(ValueError, match=r"ask for a larger keep|too few"):
        allocate(two_layers(), 0.03, policy)


def test_unknown_policy_and_broken_curve_are_named():
    with pytest.raises(KeyError, match=r"globl.*did you mean global"):
        allocate(two_layers(), 0.5, "globl")
    curves = two_layers()
    curves["layer_1/mlp/up/kernel"].errors[3] = np.nan
    with pytest.raises(ValueError, match="not finite at layer_1/mlp/up/kernel"):
        allocate(curves, 0.5, "global")


def test_one_rank_per_type_needs_one_size_per_type():
    errors = np.linspace(1, 0, 9)
    curves = {
        "layer_0/mlp/up/kernel": Curve(SiteSize.matrix(8, 8), errors),
        "layer_1/mlp/up/kernel": Curve(SiteSize.matrix(8, 16), errors),
    }
    with pytest.raises(ValueError, match="sizes differ between blocks at mlp/up"):
        allocate(curves, 0.5, "per-type")


@pytest.mark.parametrize(("width", "step"), [(1536, 32), (520, 32), (512, 8), (48, 8), (7, 1)])
def test_steps_of_several_tiles_are_for_wide_sites(width, step):
    """Ranks go up by 4 tiles of 8 only where 16 steps of 32 save weights."""
    curve = Curve(SiteSize(width * 9, 9, tiles=4), np.linspace(1, 0, width + 1))
    ranks, costs, _ = curve.candidates(8)
    assert ranks == [*range(step, width, step), None]
    assert list(costs) == [9 * r for r in ranks[:-1]] + [9 * width]
