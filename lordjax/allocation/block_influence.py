"""MoDeGPT's policy: one fraction kept per block, larger for blocks of high influence."""

from __future__ import annotations

import numpy as np

from lordjax.allocation.curves import Curves, Ranks, dense_weights
from lordjax.allocation.knapsack import fill
from lordjax.names import layer_index

INFLUENCE_CAP = 0.95  # largest fraction of a block that `block_influence` removes


def influence_removal(
    scores: np.ndarray, removed: float, temperature: float, cap: float = INFLUENCE_CAP
) -> np.ndarray:
    """Returns the fraction to remove from every block: little where the influence is high.

    The result maximizes ``Σ s (1 - φ) + ε Σ H(φ)``, ``H(φ) = -φ log φ``, subject to
    ``mean φ = removed`` and ``0 ≤ φ ≤ cap``. The solution is ``φ = min(cap, c·exp(-s/ε))``, where
    the budget fixes c. We pin the blocks above the cap and scale the others until none is above.

    Args:
      scores: ``[blocks]`` block influence; see `observers.observe`.
      removed: mean fraction to remove, in [0, cap].
      temperature: ε; a small one removes from few blocks, an infinite one from all alike.
      cap: largest fraction to remove from one block.

    Returns:
      ``[blocks]`` fractions in [0, cap].

    Raises:
      ValueError: if ``removed`` is above the cap, or the temperature is not positive.

    Source: MoDeGPT, equations 10 and 11; the cap: theory/modegpt §5.3.
    """
    if not 0 <= removed <= cap:
        raise ValueError(
            f"fraction to remove: expected 0 to {cap}, the cap of a block, got {removed:.3g}; "
            "ask for a larger keep"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scores = np.asarray(scores, float)
    pinned = np.zeros(len(scores), bool)
    while True:
        free = removed * len(scores) - cap * pinned.sum()
        # Relative to the least of the remaining scores: otherwise all exponentials may underflow.
        least = scores[~pinned].min() if not pinned.all() else 0.0
        weights = np.where(pinned, 0.0, np.exp(-np.maximum(scores - least, 0) / temperature))
        fractions = np.where(pinned, cap, weights * (free / max(weights.sum(), 1e-300)))
        above = ~pinned & (fractions > cap)
        if not above.any():
            return fractions
        pinned |= above


def block_influence(
    curves: Curves, keep: float, tile: int, *, temperature: float = 0.1
) -> tuple[Ranks, float | None]:
    """Keeps one fraction per block, chosen from its influence, at all sites of the block (MoDeGPT).

    Ranks are rounded down to the tile. The rest of the budget is spent where one step up saves the
    most error per weight.

    Args:
      curves: site path -> curve, with the block influence.
      keep: fraction of the dense weights to keep, in (0, 1].
      tile: ranks are multiples of this.
      temperature: see `influence_removal`.

    Returns:
      The ranks, and None: no lower bound on the error is known.

    Raises:
      ValueError: if a block would have to lose more than `INFLUENCE_CAP`, or the temperature is not
        positive.
    """
    if 1 - keep > INFLUENCE_CAP:
        raise ValueError(
            f"the budget leaves {keep:.3g} of the weights that can be removed, and no block may "
            f"lose more than {INFLUENCE_CAP}; ask for a larger keep"
        )
    layers = sorted({layer_index(path) for path in curves})
    scores = {layer_index(path): curve.influence for path, curve in curves.items()}
    removed = influence_removal(np.array([scores[i] for i in layers]), 1 - keep, temperature)
    kept = dict(zip(layers, 1 - removed, strict=True))
    candidates = [curve.candidates(tile) for curve in curves.values()]
    index = np.array(
        [
            max(0, int(np.searchsorted(costs, kept[layer_index(path)] * costs[-1], "right")) - 1)
            for path, (_, costs, _) in zip(curves, candidates, strict=True)
        ]
    )
    costs, errors = [c[1] for c in candidates], [c[2] for c in candidates]
    index = fill(costs, errors, keep * dense_weights(curves), index)
    ranks = {path: c[0][i] for path, c, i in zip(curves, candidates, index, strict=True)}
    return ranks, None
