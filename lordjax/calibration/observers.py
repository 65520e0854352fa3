"""Observers: jitted functions that run one block on one batch and update statistics.

`observe` runs a block forward and updates statistics of activations. `observe_pair` relates the
activations of a dense and a compressed block. `observe_gradients` runs a block backward and updates
statistics of loss gradients. `forward_pass` and `backward_pass` call these functions for all blocks
and batches. `statistics` holds the accumulators.

Parameters are arguments of the jitted functions, so that blocks of equal shapes share one compiled
program. The accumulators are donated. Their structure says which statistics are collected: for
activations it is a dict from ``"<tap>:<kind>"`` to a statistic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lordjax.calibration.gradient_updates import update_gradients
from lordjax.calibration.statistics import STATISTICS, Moments
from lordjax.kernels import trees
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.layers import PERTURBATIONS, TAPS
from lordjax.models.sites import LINEAR_SITES, Site
from lordjax.models.transformer import Transformer, default_positions
from lordjax.runtime import target

Stats = dict[str, Any]
# Parameters that are used before the first block.
EMBEDDINGS = ("embed", "project_in", "positions", "token_types", "embed_norm")
BLOCK = "block"  # used as the name of a tap: the pair of a block's input and output


def moment_taps(block: Mapping[str, Any], sites: Iterable[Site] = LINEAR_SITES) -> dict[str, str]:
    """Chooses, for every site, the cheapest tap that gives the second moment of its output.

    This is the tap of the input, if the input is no wider than the widest layer that reads it;
    layers that read the same input share its statistic. Else it is the tap of the output. So no
    second moment is larger than the smaller side of its kernels.

    Args:
      block: parameters of the block, nested.
      sites: sites to choose for; those that the block does not have are left out.

    Returns:
      site path -> tap.
    """
    flat = trees.flatten(block)
    sites = tuple(site for site in sites if site.path in flat)
    shapes = {site.path: flat[site.path].shape for site in sites}
    taps = {}
    for site in sites:
        siblings = [shapes[other.path] for other in sites if other.input_tap == site.input_tap]
        narrow = siblings[0][0] <= max(out for _, out in siblings)
        taps[site.path] = site.input_tap if narrow else site.output_tap
    return taps


def sequences_per_step(sequences: int, length: int) -> int:
    """Chooses the batch size at which the default backend runs a block fastest.

    On CPU the activations of a step should fit the cache: forward passes of 1024 tokens of a model
    of width 576 take a sixth less time per token than those of 4096. An accelerator needs large
    batches. Batch sizes that divide the number of sequences are preferred, because a smaller last
    batch needs another compilation.

    Args:
      sequences: number of calibration sequences.
      length: tokens of a sequence.

    Returns:
      Sequences of a batch, at least 1.
    """
    most = max(1, (1024 if target.platform() == "cpu" else 8192) // length)
    even = [n for n in range(most, most // 2, -1) if sequences % n == 0]
    return even[0] if even else most


def empty(widths: Mapping[str, Any]) -> Stats:
    """Returns zero accumulators for ``{"<tap>:<kind>": width}``.

    The width is the argument of the ``zeros`` of that kind; see `statistics.STATISTICS`.
    """
    return {key: STATISTICS[key.rsplit(":", 1)[1]].zeros(width) for key, width in widths.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def embed(
    non_block_params: Any,
    tokens: Int[Array, "b s"],
    mask: Bool[Array, "b s"] | None = None,
    *,
    config: ModelConfig,
) -> Float[Array, "b s m"]:
    """Computes the residual stream before the first block.

    Args:
      non_block_params: parameters outside the blocks; only `EMBEDDINGS` are read.
      tokens: token ids.
      mask: False at padding.
      config: the architecture.
    """
    model, params = Transformer(config), {"params": non_block_params}
    x: Any = model.apply(params, tokens, mask, method=Transformer.embed_tokens)
    return x


@functools.partial(
    jax.jit, static_argnames=("config", "sliding_window", "forward"), donate_argnames=("stats",)
)
def observe(
    block: Any,
    x: Float[Array, "b s m"],
    mask: Bool[Array, "b s"] | None,
    stats: Stats,
    *,
    config: ModelConfig,
    sliding_window: int | None,
    forward: bool = True,
) -> tuple[Float[Array, "b s m"] | None, Stats]:
    """Runs a block on a batch and updates statistics of its activations.

    Args:
      block: parameters of the block.
      x: residual stream before the block.
      mask: False at padding.
      stats: ``"<tap>:<kind>"`` -> accumulator (donated).
      config: the architecture.
      sliding_window: sliding window of this layer's attention.
      forward: whether to return the block's output. If not, XLA drops the layers behind the last
        tap that is needed.

    Returns:
      The block's output, or None; the updated accumulators.
    """
    positions = default_positions(x, mask)
    y, state = Block(config, sliding_window).apply(
        {"params": block}, x, positions, mask, mutable=[TAPS] if stats else []
    )
    taps = trees.flatten(state.get(TAPS, {})) | {BLOCK: (x, y)}
    new = {key: stat.update(taps[key.rsplit(":", 1)[0]], mask) for key, stat in stats.items()}
    return (y if forward else None), new


@functools.partial(
    jax.jit,
    static_argnames=("config", "sliding_window"),
    donate_argnames=("target", "fitted", "cross"),
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
    sliding_window: int | None,
) -> tuple[dict[str, Moments], dict[str, Moments], dict[str, Any]]:
    """Runs the dense and the compressed block on a batch and relates their activations.

    Args:
      blocks: parameters of the dense block, and of the compressed one.
      xs: residual stream before the block in the dense model, and in the model that is compressed
        up to this block.
      mask: False at padding.
      target: output tap -> `Moments` of the dense block's outputs ``y`` (donated).
      fitted: input tap -> `Moments` of the compressed block's inputs ``x̂`` (donated).
      cross: ``"<input tap>|<output tap>"`` -> Σ ``x̂ᵀ y`` ``[in, out]``, uncentered (donated).
      config: the architecture.
      sliding_window: sliding window of this layer's attention.

    Returns:
      The updated ``target``, ``fitted`` and ``cross``.
    """
    positions = default_positions(xs[0], mask)
    taps = []
    for block, x in zip(blocks, xs, strict=True):
        _, state = Block(config, sliding_window).apply(
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
    jax.jit, static_argnames=("config", "sliding_window", "shares"), donate_argnames=("stats",)
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
    sliding_window: int | None,
    shares: int = 1,
) -> tuple[Float[Array, "b s m"], dict[str, dict[str, Any]]]:
    """Runs a block backward on a batch and updates statistics of loss gradients.

    Args:
      block: parameters of the block.
      x: residual stream before the block.
      mask: False at padding.
      cotangent: gradient of the loss at the block's output.
      bases: site path -> ``[out, m]`` basis in which the gradient is stored (`linalg.row_space`);
        None: the gradient is stored as it is.
      stats: accumulators by name, then by site path (donated); see `gradient_updates`.
      config: the architecture.
      sliding_window: sliding window of this layer's attention.
      shares: number of devices that split the batch. Each device loops over its own sequences.

    Returns:
      Gradient of the loss at the block's input; the updated accumulators.
    """
    positions = default_positions(x, mask)
    sites = {s.path: s for s in LINEAR_SITES if any(s.path in table for table in stats.values())}

    def run(x: Array, delta: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        variables = {"params": block, PERTURBATIONS: trees.unflatten(delta)}
        y, state = Block(config, sliding_window).apply(
            variables, x, positions, mask, mutable=[TAPS]
        )
        return y, trees.flatten(state[TAPS])

    flat = trees.flatten(block)
    zero = {
        s.output_tap: jnp.zeros((*x.shape[:2], flat[path].shape[-1]), x.dtype)
        for path, s in sites.items()
    }
    queries = flat["attention/q/kernel"].shape[-1]
    zero |= {tap: jnp.zeros((*x.shape[:2], queries), x.dtype) for tap in stats.get("gates", {})}
    _, pull, taps = jax.vjp(run, x, zero, has_aux=True)
    grad_x, grads = pull(cotangent)
    return grad_x, update_gradients(stats, sites, taps, grads, bases, mask, shares)
