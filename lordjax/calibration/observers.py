"""Statistics of one block: forward for activations, backward for gradients.

Both are jitted steps that fold a batch into donated accumulators; parameters are arguments, so
all blocks of a model share one compilation. Which statistics are taken is the structure of the
accumulator: a dict from ``"<tap>:<kind>"`` to a statistic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lordjax.calibration.statistics import (
    STATISTICS,
    HeadMoments,
    MeanSquare,
    Moments,
    SecondMoment,
)
from lordjax.kernels import trees
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.layers import PERTURBATIONS, TAPS
from lordjax.models.sites import LINEAR_SITES, Site
from lordjax.models.transformer import Transformer, default_positions

Stats = dict[str, Any]
# Parameters that come before the first block.
EMBEDDINGS = ("embed", "project_in", "positions", "token_types", "embed_norm")
BLOCK = "block"  # stands for the pair of a block's input and output where a tap is named


def moment_taps(block: Mapping[str, Any], sites: Iterable[Site] = LINEAR_SITES) -> dict[str, str]:
    """Site path -> the tap whose second moment gives the site's output moments most cheaply.

    The input's, if it is no wider than the widest layer it feeds (it is shared by the group);
    else the output's. So no second moment is larger than the smaller side of its kernels.
    """
    flat = trees.flatten(block)
    sites = tuple(site for site in sites if site.path in flat)
    shapes = {site.path: flat[site.path].shape for site in sites}
    taps = {}
    for site in sites:
        group = [shapes[other.path] for other in sites if other.input_tap == site.input_tap]
        narrow = group[0][0] <= max(out for _, out in group)
        taps[site.path] = site.input_tap if narrow else site.output_tap
    return taps


def windows_per_step(windows: int, length: int) -> int:
    """How many of ``windows`` of this length the default backend does best at a time.

    On CPU the activations of a step should fit the cache: forward passes of 1024 tokens of a model
    of width 576 take a sixth less time than of 4096. An accelerator wants to be filled. Steps that
    divide the windows are preferred: a last, shorter one compiles again.
    """
    most = max(1, (1024 if jax.default_backend() == "cpu" else 8192) // length)
    even = [n for n in range(most, most // 2, -1) if windows % n == 0]
    return even[0] if even else most


def empty(widths: Mapping[str, Any]) -> Stats:
    """Zero accumulators for ``{"<tap>:<kind>": width}``, as wide as the kind's ``zeros`` says."""
    return {key: STATISTICS[key.rsplit(":", 1)[1]].zeros(width) for key, width in widths.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def embed(
    rest: Any,
    tokens: Int[Array, "b s"],
    mask: Bool[Array, "b s"] | None = None,
    *,
    config: ModelConfig,
) -> Float[Array, "b s m"]:
    """The residual stream before the first block; of ``rest`` only `EMBEDDINGS` are read."""
    model = Transformer(config)
    x: Any = model.apply({"params": rest}, tokens, mask, method=Transformer.embed_tokens)
    return x


@functools.partial(
    jax.jit, static_argnames=("config", "window", "forward"), donate_argnames=("stats",)
)
def observe(
    block: Any,
    x: Float[Array, "b s m"],
    mask: Bool[Array, "b s"] | None,
    stats: Stats,
    *,
    config: ModelConfig,
    window: int | None,
    forward: bool = True,
) -> tuple[Float[Array, "b s m"] | None, Stats]:
    """Runs a block on a batch and adds its taps to ``stats`` (donated).

    With ``forward=False`` the block's output is not returned, and XLA drops the layers behind the
    last tap that is asked for.
    """
    positions = default_positions(x, mask)
    y, state = Block(config, window).apply(
        {"params": block}, x, positions, mask, mutable=[TAPS] if stats else []
    )
    taps = trees.flatten(state.get(TAPS, {})) | {BLOCK: (x, y)}
    new = {key: stat.update(taps[key.rsplit(":", 1)[0]], mask) for key, stat in stats.items()}
    return (y if forward else None), new


@functools.partial(
    jax.jit, static_argnames=("config", "window"), donate_argnames=("target", "fitted", "cross")
)
def observe_pair(
    blocks: tuple[Any, Any],
    xs: tuple[Float[Array, "b s m"], Float[Array, "b s m"]],
    mask: Bool[Array, "b s"] | None,
    target: dict[str, Moments],
    fitted: dict[str, Moments],
    cross: dict[str, Any],
    *,
    config: ModelConfig,
    window: int | None,
) -> tuple[dict[str, Moments], dict[str, Moments], dict[str, Any]]:
    """Runs the untouched and the compressed block in lockstep and relates their taps.

    Args:
      blocks: parameters (untouched, compressed).
      xs: residual streams (of the untouched prefix, of the compressed prefix).
      mask: False at padding.
      target: output tap -> moments of the untouched outputs ``y``.
      fitted: input tap -> moments of the compressed inputs ``x̂``.
      cross: ``"<input tap>|<output tap>"`` -> Σ ``x̂ᵀ y``, uncentred.
      config: the architecture.
      window: sliding window of this layer.
    """
    positions = default_positions(xs[0], mask)
    taps = []
    for block, x in zip(blocks, xs, strict=True):
        _, state = Block(config, window).apply(
            {"params": block}, x, positions, mask, mutable=[TAPS]
        )
        taps.append(trees.flatten(state[TAPS]))
    weights = None if mask is None else mask[..., None]
    new_cross = {}
    for key, total in cross.items():
        source, goal = key.split("|")
        x, y = taps[1][source], taps[0][goal]
        x = x if weights is None else jnp.where(weights, x, 0)
        x, y = (z.reshape(-1, z.shape[-1]).astype(total.dtype) for z in (x, y))
        new_cross[key] = total + jnp.matmul(x.T, y, precision="highest")
    return (
        {tap: moments.update(taps[0][tap], mask) for tap, moments in target.items()},
        {tap: moments.update(taps[1][tap], mask) for tap, moments in fitted.items()},
        new_cross,
    )


@functools.partial(
    jax.jit, static_argnames=("config", "window", "shares"), donate_argnames=("stats",)
)
def observe_gradients(
    block: Any,
    x: Float[Array, "b s m"],
    mask: Bool[Array, "b s"] | None,
    cotangent: Float[Array, "b s m"],
    bases: dict[str, Any],
    stats: dict[str, dict[str, Any]],
    *,
    config: ModelConfig,
    window: int | None,
    shares: int = 1,
) -> tuple[Float[Array, "b s m"], dict[str, dict[str, Any]]]:
    """Runs a block backwards and adds the gradients at its linear outputs.

    Args:
      block: parameters.
      x: block input.
      mask: False at padding.
      cotangent: gradient of the loss at the block's output.
      bases: site path -> ``[out, m]`` coordinates for the gradient (`linalg.row_space`), or None.
      stats: accumulators (donated). ``gradients``: site path -> second moment of the loss gradient
        at the site's output; ``fisher``: site path -> ``[in, out]``, the sum over windows of
        squared weight gradients; ``row_fisher``: ``[in]``, that summed over outputs;
        ``weighted_inputs``: site path -> `SecondMoment` of its input, every token weighted by the
        squared norm of the gradient at its output; ``weighted_squares``: site path -> `MeanSquare`
        of that gradient, every token weighted by the squared norm of its input;
        ``gates``: ``"attention/queries"`` -> `HeadMoments` of
        how the loss changes with the size of each rotary pair of the queries of a key head, or of
        all of them without rotary positions.
      config: the architecture.
      window: sliding window of this layer.
      shares: how many devices share the rows; what is done window by window each does with its own.

    Returns:
      Gradient at the block's input, and the accumulators.
    """
    positions = default_positions(x, mask)
    sites = {s.path: s for s in LINEAR_SITES if any(s.path in table for table in stats.values())}
    gates = stats.get("gates", {})

    def run(x: Array, delta: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        variables = {"params": block, PERTURBATIONS: trees.unflatten(delta)}
        y, state = Block(config, window).apply(variables, x, positions, mask, mutable=[TAPS])
        return y, trees.flatten(state[TAPS])

    flat = trees.flatten(block)
    zero = {
        s.output_tap: jnp.zeros((*x.shape[:2], flat[path].shape[-1]), x.dtype)
        for path, s in sites.items()
    }
    queries = flat["attention/q/kernel"].shape[-1]
    zero |= {tap: jnp.zeros((*x.shape[:2], queries), x.dtype) for tap in gates}
    _, pull, taps = jax.vjp(run, x, zero, has_aux=True)
    grad_x, grads = pull(cotangent)
    return grad_x, _add_gradients(stats, sites, taps, grads, bases, mask, shares)


def _add_gradients(
    stats: dict[str, dict[str, Any]],
    sites: Mapping[str, Site],
    taps: Mapping[str, Array],
    grads: Mapping[str, Array],
    bases: Mapping[str, Any],
    mask: Bool[Array, "b s"] | None,
    shares: int,
) -> dict[str, dict[str, Any]]:
    """Accumulators of `observe_gradients` with one batch more, from activations and gradients."""

    def second_moment(path: str, moment: Any) -> Any:
        g = grads[sites[path].output_tap]
        if bases[path] is not None:
            g = jnp.matmul(g, bases[path].astype(g.dtype), precision="highest")
        return moment.update(g, mask)

    def fisher(path: str, total: Array) -> Array:
        def window(totals: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
            gradient = jnp.matmul(jnp.swapaxes(pair[0], 1, 2), pair[1], precision="highest")
            square = gradient**2
            return totals + (square if total.ndim == 2 else jnp.sum(square, axis=-1)), None

        def cut(a: Array) -> Array:  # [windows of a share, shares, ...]
            return jnp.swapaxes(a.reshape(shares, -1, *a.shape[1:]), 0, 1)

        # One after the other: weight gradients of a whole batch may not fit.
        site = sites[path]
        others = jnp.zeros((shares - 1, *total.shape), total.dtype)
        start = jnp.concatenate([total[None], others])
        pairs = (cut(taps[site.input_tap]), cut(grads[site.output_tap]))
        return jnp.sum(jax.lax.scan(window, start, pairs)[0], axis=0)

    def weighted_inputs(path: str, total: SecondMoment) -> SecondMoment:
        return total.update(taps[sites[path].input_tap], energy(grads[sites[path].output_tap]))

    def weighted_squares(path: str, total: MeanSquare) -> MeanSquare:
        return total.update(grads[sites[path].output_tap], energy(taps[sites[path].input_tap]))

    def energy(a: Array) -> Array:
        squares = jnp.sum(a**2, axis=-1)
        return squares if mask is None else jnp.where(mask, squares, 0)

    def gate(tap: str, total: HeadMoments) -> HeadMoments:
        # The loss changes by g·q when a pair's query is scaled; keys have the same effect, summed.
        # Members of a pair are d/2 apart, so that pairs are the last axis.
        groups, pairs = total.total.shape[:2]
        effect = (grads[tap] * taps[tap]).reshape(*taps[tap].shape[:2], groups, -1, pairs)
        return total.update(jnp.sum(effect, axis=3).reshape(*effect.shape[:2], -1), mask)

    add = {
        "gradients": second_moment,
        "row_fisher": fisher,
        "fisher": fisher,
        "weighted_inputs": weighted_inputs,
        "weighted_squares": weighted_squares,
        "gates": gate,
    }
    return {
        name: {key: add[name](key, total) for key, total in table.items()}
        for name, table in stats.items()
    }
