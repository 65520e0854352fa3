"""Attention: in chunks of queries, over a cache, and the Flax module that uses both."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lordjax.kernels.base import with_second_row
from lordjax.models.config import ModelConfig, Rope
from lordjax.models.layers import Linear, RMSNorm, softcap, tap
from lordjax.models.rope import rotate, row_frequencies
from lordjax.runtime import target


def attend(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s k d"],
    v: Float[Array, "b s k e"],
    *,
    scale: float,
    cap: float | None = None,
    sliding_window: int | None = None,
    mask: Bool[Array, "b s"] | None = None,
    causal: bool = True,
) -> Float[Array, "b s h e"]:
    """Computes grouped-query attention.

    Args:
      q: queries; head h uses key head ``h // (heads / key heads)``.
      k: keys. Their width may differ from that of the values.
      v: values.
      scale: factor on the logits.
      cap: bound of the scaled logits; see `softcap`. None: no bound.
      sliding_window: number of positions that a token sees, itself included; None: all.
      mask: False at padding, which no token sees. A query that sees nothing gives zeros.
      causal: whether a token sees only itself and earlier tokens; a sliding window needs it.

    Returns:
      Attention output in the dtype of ``v``; the softmax is computed in float32.

    Raises:
      ValueError: if there is a sliding window, but attention is not causal.
    """
    if sliding_window is not None and not causal:
        raise ValueError(
            f"sliding window of {sliding_window} tokens: expected causal attention, but this model "
            "attends in both directions; remove the window from the config"
        )
    plain = causal and cap is None and sliding_window is None and mask is None
    if plain and _has_fused_kernel(q.dtype, max(q.shape[3], v.shape[3])):
        return fused(q, k, v, scale=scale)
    how: dict[str, Any] = {"cap": cap, "sliding_window": sliding_window, "causal": causal}
    return in_chunks(q, k, v, mask, scale=scale, **how)


FUSED_WIDTH = 256  # widest head of the fused kernel
FUSED_BLOCK = 128  # positions that it works on at a time


def _has_fused_kernel(dtype: Any, width: int) -> bool:
    """Returns whether `fused` is used: in 16 bits on one GPU, where this JAX has Triton."""
    return (
        target.platform() == "gpu"
        and target.device_count() == 1  # a compiler that splits arrays cannot split the kernel
        and dtype in (jnp.bfloat16, jnp.float16)
        and width <= FUSED_WIDTH
        and target.has_triton()
    )


def fused(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s k d"],
    v: Float[Array, "b s k e"],
    *,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "b s h e"]:
    """Computes plain causal `attend` by JAX's Pallas kernel, which writes no logits.

    Args are those of `attend`, and ``interpret``: whether the kernel is interpreted, which any
    device can do.
    """
    from jax.experimental.pallas.ops.gpu import attention  # Pallas is slow to import

    length, width = q.shape[1], max(q.shape[3], v.shape[3])

    def filled(x: Array) -> Array:
        """Zeros behind the last position, which no query sees, and beside narrower heads."""
        x = jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)
        rows = -length % FUSED_BLOCK
        return jnp.pad(x, [(0, 0), (0, rows), (0, 0), (0, width - x.shape[3])])

    # With JAX's default blocks narrow heads spill registers, and wide ones exceed shared memory.
    own, keys, gradients = (FUSED_BLOCK, 64, 32) if width <= 128 else (64, 32, 16)
    blocks = attention.BlockSizes(own, keys, *[gradients] * 4)
    how: dict[str, Any] = {"sm_scale": scale, "causal": True, "interpret": interpret}
    out: Any = attention.mha(filled(q), filled(k), filled(v), None, block_sizes=blocks, **how)
    return out[:, :length, :, : v.shape[3]]


def in_chunks(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s k d"],
    v: Float[Array, "b s k e"],
    mask: Bool[Array, "b s"] | None = None,
    *,
    scale: float,
    cap: float | None = None,
    sliding_window: int | None = None,
    causal: bool = True,
    chunk: int = 256,
) -> Float[Array, "b s h e"]:
    """Computes `attend` one chunk of queries after the other.

    A chunk multiplies only the keys that it can see, which saves half of the work of a long causal
    sequence. On CPU one sequence and key head is computed at a time, so that its logits stay in
    cache: 3.4 times faster at 4 × 1024 positions on two cores than all heads at once.

    Args are those of `attend`, and ``chunk``, the number of queries per product.
    """
    batch, length, heads, kv_heads = *q.shape[:3], k.shape[2]

    def split(x: Array) -> Array:
        """``[b, s, k·n, d]`` -> ``[b·k, n, s, d]``."""
        x = x.reshape(batch, length, kv_heads, -1, x.shape[-1]).transpose(0, 2, 3, 1, 4)
        return x.reshape(batch * kv_heads, *x.shape[2:])

    seen = None if mask is None else jnp.repeat(jnp.asarray(mask), kv_heads, axis=0)
    split_inputs = (split(q * scale), split(k)[:, 0], split(v)[:, 0], seen)
    attend_one: Any = functools.partial(
        _attend_kv_head, cap=cap, sliding_window=sliding_window, causal=causal, chunk=chunk
    )
    # The backward pass computes logits again: this is cheaper than writing and reading them.
    attend_one = jax.checkpoint(attend_one)
    # CPU: one key head at a time. An accelerator is faster with all of them at once.
    one_by_one = target.platform() == "cpu"
    out = (
        jax.lax.map(attend_one, split_inputs) if one_by_one else jax.vmap(attend_one)(split_inputs)
    )
    return out.reshape(batch, heads, length, -1).transpose(0, 2, 1, 3)


def _attend_kv_head(
    inputs: tuple[Array, Array, Array, Array | None],
    *,
    cap: float | None,
    sliding_window: int | None,
    causal: bool,
    chunk: int,
) -> Float[Array, "g s e"]:
    """Attention of one sequence to one key head, from ``(q, k, v, mask)``.

    Shapes: queries ``[g, s, d]``, already scaled; keys ``[s, d]``; values ``[s, e]``; mask ``[s]``.
    """
    queries, keys, values, seen = inputs
    length = queries.shape[1]
    out = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        last = end if causal else length
        first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
        distance = jnp.arange(start, end)[:, None] - jnp.arange(first, last)[None]
        visible = _in_reach(distance, sliding_window)
        if not causal:
            visible = jnp.ones_like(visible)
        if seen is not None:
            visible = visible & seen[None, first:last]
        # Plain matrix products: XLA's CPU backend is slow on several contracted axes.
        rows = queries[:, start:end].reshape(-1, queries.shape[-1])
        logits = (rows @ keys[first:last].T).reshape(-1, end - start, last - first)
        weights, total = _softmax(softcap(logits, cap), visible[None])
        rows = weights.reshape(-1, last - first).astype(values.dtype)
        mixed = (rows @ values[first:last]).reshape(*weights.shape[:2], -1)
        # The division comes after the product: fewer elements, the same value.
        out.append((mixed.astype(total.dtype) / total).astype(values.dtype))
    return jnp.concatenate(out, axis=1)


def attend_cached(
    q: Float[Array, "b s h d"],
    keys: Float[Array, "b k t d"],
    values: Float[Array, "b k t e"],
    positions: Int[Array, "b s"],
    *,
    scale: float,
    cap: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "b s h e"]:
    """Computes causal attention of a few queries to a cache whose column i is position i.

    Args:
      q: queries; head h uses key head ``h // (heads / key heads)``.
      keys: cached keys. Columns behind a query's position are not seen; they may hold any finite
        numbers.
      values: cached values, column by column like the keys.
      positions: position of every query.
      scale: factor on the logits.
      cap: bound of the scaled logits; see `softcap`. None: no bound.
      sliding_window: number of positions that a token sees, itself included; None: all.

    Returns:
      Attention output in the dtype of ``q``; the softmax is computed in float32.
    """
    batch, length, heads, width = q.shape
    kv_heads, capacity = keys.shape[1:3]
    rows = (q * scale).astype(keys.dtype).reshape(batch, length, kv_heads, -1, width)
    # Queries of one key head side by side: XLA's CPU backend is fast on a plain batched product.
    queries = length * heads // kv_heads
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, queries, width)
    # Transposed keys are 3 % faster on CPU. On a GPU XLA would copy the cache to turn it around.
    if target.platform() == "cpu":
        logits = jnp.matmul(rows, keys.mT)
    else:
        logits = jnp.einsum("bkrd,bktd->bkrt", with_second_row(rows), keys)[..., :queries, :]
    distance = positions[:, :, None] - jnp.arange(capacity, dtype=positions.dtype)[None, None]
    visible = _in_reach(distance, sliding_window)
    visible = jnp.repeat(visible, heads // kv_heads, axis=1)[:, None]
    weights, total = _softmax(softcap(logits, cap), visible)
    mixed = jnp.matmul(with_second_row(weights.astype(values.dtype)), values)
    mixed = mixed[..., :queries, :].astype(total.dtype) / total
    mixed = mixed.reshape(batch, kv_heads, length, heads // kv_heads, -1).transpose(0, 2, 1, 3, 4)
    return mixed.astype(q.dtype).reshape(batch, length, heads, -1)


def _in_reach(distance: Array, sliding_window: int | None) -> Array:
    """Whether a key is not ahead of its query, and inside the sliding window."""
    if sliding_window is None:
        return distance >= 0
    return (distance >= 0) & (distance < sliding_window)


def _softmax(logits: Array, visible: Array) -> tuple[Array, Array]:
    """Unnormalized softmax in float32, and its sum; the sum is 1 where nothing is visible."""
    logits = jnp.where(visible, logits.astype(jnp.float32), -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights, jnp.where(total > 0, total, 1.0)


CACHE = "cache"  # name of the Flax collection of cached keys and values


class Attention(nn.Module):
    """Self-attention with grouped key/value heads and rotary positions."""

    config: ModelConfig
    sliding_window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Computes attention and its output projection.

        Args:
          x: normalized residual stream.
          positions: position of every token.
          mask: False at padding, which no token sees; None: there is no padding.
        """
        c = self.config
        x = tap(self, "attention_in", x)

        def project(name: str, heads: int) -> Float[Array, "b s h d"]:
            y = Linear(heads * c.head_size, c.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:2], heads, -1)

        q = project("q", c.num_heads)
        k, v = project("k", c.num_kv_heads), project("v", c.num_kv_heads)
        if c.qk_norm:
            q, k = self._normalized("q_norm", q), self._normalized("k_norm", k)
        rope = c.rope if self.sliding_window is None else c.local_rope or c.rope
        if rope is not None:
            q, k = self._rotate(rope, q, k, positions)
        q, k = (
            tap(self, name, z.reshape(*x.shape[:2], -1)).reshape(z.shape)
            for name, z in (("queries", q), ("keys", k))
        )

        # The scale uses the original head size, because compression approximates q @ k.
        scale = c.attention_scale or c.head_size**-0.5
        how: dict[str, Any] = {
            "scale": scale,
            "cap": c.attention_softcap,
            "sliding_window": self.sliding_window,
        }
        if self.has_variable(CACHE, "keys"):
            cached = self._extended("keys", k, positions), self._extended("values", v, positions)
            mixed = attend_cached(q, *cached, positions, **how)
        else:
            if self.is_mutable_collection(CACHE):
                self.put_variable(CACHE, "keys", k.transpose(0, 2, 1, 3))
                self.put_variable(CACHE, "values", v.transpose(0, 2, 1, 3))
            mixed = attend(q, k, v, **how, mask=mask, causal=c.causal)
        mixed = tap(self, "attention_out", mixed.reshape(*x.shape[:2], -1))
        return Linear(c.hidden_size, c.out_bias, name="o")(mixed)

    def _normalized(self, name: str, x: Float[Array, "b s h d"]) -> Float[Array, "b s h d"]:
        """Normalizes each head, or all heads at once."""
        rows = x.reshape(*x.shape[:2], -1) if self.config.wide_qk_norm else x
        return RMSNorm(self.config.norm_eps, name=name)(rows).reshape(x.shape)

    def _extended(
        self, name: str, new: Float[Array, "b s k d"], positions: Int[Array, "b s"]
    ) -> Float[Array, "b k t d"]:
        """The cache after new columns are written, in order, from each row's first position on."""
        columns, new = self.get_variable(CACHE, name), new.transpose(0, 2, 1, 3)

        def write(row: Array, new: Array, first: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), first, axis=1)

        columns = jax.vmap(write)(columns, new, positions[:, 0])
        self.put_variable(CACHE, name, columns)
        return columns

    def _rotate(
        self,
        rope: Rope,
        q: Float[Array, "b s h d"],
        k: Float[Array, "b s k d"],
        positions: Int[Array, "#b s"],
    ) -> tuple[Float[Array, "b s h d"], Float[Array, "b s k d"]]:
        """Queries and keys after the rotary embedding.

        Where rotary pairs were pruned, the parameter ``rope_index`` holds the indices of the
        frequencies that are left. It is the only parameter that is not a weight.
        """
        c = self.config
        rows, factor = row_frequencies(rope, c.head_size, c.max_positions, positions)
        turns = rows[:, None]  # [b, 1, half]
        if self.has_variable("params", "rope_index"):
            turns = rows[:, self.get_variable("params", "rope_index")]  # [b, k, half]
        k = rotate(k, positions, turns, factor)
        if turns.shape[1] > 1:
            turns = jnp.repeat(turns, c.num_heads // c.num_kv_heads, axis=1)
        return rotate(q, positions, turns, factor), k
