"""The model: attention, MLP, block, head. One file for every family.

Parameters (``[in, out]`` kernels; biases where the family has them)::

    embed/embedding                         [vocab, m]
    project_in/kernel                       [e, m], only where embeddings have another width
    positions/embedding                     [rows, m], only where positions are learned
    token_types/embedding                   [types, m], only in encoders
    embed_norm/{scale,bias}                 [m], only in encoders
    layer_0/attention_norm/scale            [m]; and bias, where norms have one
    layer_0/attention/{q,k,v,o}/kernel      [m, h·d] [m, k·d] [m, k·e] [h·e, m]
    layer_0/attention/rope_index            [k, d/2], only where rotary pairs were dropped
    layer_0/attention/{q,k}_norm/scale      [d], only where heads are normalised
    layer_0/{attention,mlp}_post_norm/scale [m], only where outputs are normalised, too
    layer_0/mlp_norm/scale                  [m]
    layer_0/mlp/{gate,up,down}/kernel       [m, f] [m, f] [f, m]; gate only in gated MLPs
    final_norm/scale                        [m], absent where blocks end with a norm
    project_out/kernel                      [m, e], beside project_in
    transform/dense/kernel                  [m, m], before the head of an encoder
    transform/norm/{scale,bias}             [m], where it predicts masked tokens
    head/kernel                             [m, vocab or classes], absent when tied to the embedding

The norm before the MLP is absent where attention and MLP read the same normalised stream.

A compressed model is this same module with other leaves: sizes that compression may change are
read from the arrays. Places where statistics can be taken are marked with `stats.tap`.

If the collection ``cache`` is mutable, keys and values are kept there::

    layer_0/attention/{keys,values}         [b, k, capacity, d] [b, k, capacity, e]

Column i is position i. A pass without a cache makes one of as many columns as it has tokens; a pass
with one writes its tokens' columns and attends to all columns up to their positions (`generate`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lordjax.models.config import ModelConfig, Rope
from lordjax.models.heads import TRANSFORMS
from lordjax.models.layers import (
    ACTIVATIONS,
    NORMS,
    Bias,
    Linear,
    RMSNorm,
    attend,
    attend_cached,
    rope_frequencies,
    rotate,
    softcap,
)
from lordjax.stats import tap

CACHE = "cache"  # the collection of keys and values


class Attention(nn.Module):
    """Self-attention with grouped key/value heads and rotary positions."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Attends; ``mask`` is False at padding, which no token sees."""
        c = self.config
        x = tap(self, "attention_in", x)

        def project(name: str, heads: int) -> Float[Array, "b s h d"]:
            y = Linear(heads * c.head_size, c.qkv_bias, name=name)(x)
            return y.reshape(*y.shape[:2], heads, -1)

        q = project("q", c.num_heads)
        k, v = project("k", c.num_kv_heads), project("v", c.num_kv_heads)
        if c.qk_norm:
            q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        rope = c.rope if self.window is None else c.local_rope or c.rope
        if rope is not None:
            q, k = self._rotate(rope, q, k, positions)
        q, k = (
            tap(self, name, z.reshape(*x.shape[:2], -1)).reshape(z.shape)
            for name, z in (("queries", q), ("keys", k))
        )

        # The softmax scale keeps the original head size: compression approximates q @ k.
        scale = c.attention_scale or c.head_size**-0.5
        how = {"scale": scale, "cap": c.attention_softcap, "window": self.window}
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

    def _extended(
        self, name: str, new: Float[Array, "b s k d"], positions: Int[Array, "b s"]
    ) -> Float[Array, "b k t d"]:
        """The cache with new columns, which follow each other from a row's first position on."""
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
        """Queries and keys with rotary positions.

        Where pairs were dropped, ``rope_index`` says which frequencies are left: the one parameter
        that is not a weight.
        """
        c = self.config
        length = q.shape[1]
        if self.has_variable(CACHE, "keys"):
            length = self.get_variable(CACHE, "keys").shape[2]
        frequencies, factor = rope_frequencies(rope, c.head_size, c.max_positions, length)
        turns = jnp.asarray(frequencies)[None]  # [1, half]
        if self.has_variable("params", "rope_index"):
            turns = turns[0][self.get_variable("params", "rope_index")]  # [k, half]
        k = rotate(k, positions, turns, factor)
        if turns.shape[0] > 1:
            turns = jnp.repeat(turns, c.num_heads // c.num_kv_heads, axis=0)
        return rotate(q, positions, turns, factor), k


class MLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or without a gate ``down(act(up(x)))``."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b s m"]) -> Float[Array, "b s m"]:
        """Applies the MLP."""
        c = self.config
        x = tap(self, "mlp_in", x)
        act = ACTIVATIONS[c.activation]
        if c.gated:
            gate = act(Linear(c.mlp_size, c.mlp_bias, name="gate")(x))
            hidden = gate * Linear(c.mlp_size, c.mlp_bias, name="up")(x)
        else:
            hidden = act(Linear(c.mlp_size, c.mlp_bias, name="up")(x))
        hidden = tap(self, "mlp_hidden", hidden)
        return Linear(c.hidden_size, c.mlp_bias, name="down")(hidden)


class Block(nn.Module):
    """Pre-norm block: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Works on its own sub-dict of the parameters, which is how statistics are streamed:
    ``Block(config).apply({"params": params["layer_3"]}, x, positions)``.
    """

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Residual stream in, residual stream out."""
        c = self.config
        norm = NORMS[c.norm]
        h = norm(c.norm_eps, name="attention_norm")(x)
        x = x + Attention(c, self.window, name="attention")(h, positions, mask)
        h = norm(c.norm_eps, name="mlp_norm")(x)
        return x + MLP(c, name="mlp")(h)


class ParallelBlock(nn.Module):
    """Parallel block: ``x + attention(norm(x)) + mlp(norm(x))`` with one norm (GPT-J, CodeGen)."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Residual stream in, residual stream out."""
        c = self.config
        h = NORMS[c.norm](c.norm_eps, name="attention_norm")(x)
        attended = Attention(c, self.window, name="attention")(h, positions, mask)
        return x + attended + MLP(c, name="mlp")(h)


class ParallelNormsBlock(nn.Module):
    """``x + attention(norm(x)) + mlp(norm(x))`` with a norm for each of the two (GPT-NeoX)."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Residual stream in, residual stream out."""
        c = self.config
        norm = NORMS[c.norm]
        h = norm(c.norm_eps, name="attention_norm")(x)
        attended = Attention(c, self.window, name="attention")(h, positions, mask)
        h = norm(c.norm_eps, name="mlp_norm")(x)
        return x + attended + MLP(c, name="mlp")(h)


class SandwichBlock(nn.Module):
    """Block with four norms: ``x + norm(attention(norm(x)))``, then ``x + norm(mlp(norm(x)))``."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Residual stream in, residual stream out."""
        c = self.config
        norm = NORMS[c.norm]
        h = norm(c.norm_eps, name="attention_norm")(x)
        h = Attention(c, self.window, name="attention")(h, positions, mask)
        x = x + norm(c.norm_eps, name="attention_post_norm")(h)
        h = norm(c.norm_eps, name="mlp_norm")(x)
        h = MLP(c, name="mlp")(h)
        return x + norm(c.norm_eps, name="mlp_post_norm")(h)


class PostNormBlock(nn.Module):
    """Post-norm block: ``norm(x + attention(x))``, then ``norm(x + mlp(x))`` (BERT, OPT-350m)."""

    config: ModelConfig
    window: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b s m"],
        positions: Int[Array, "#b s"],
        mask: Bool[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Residual stream in, residual stream out."""
        c = self.config
        norm = NORMS[c.norm]
        attended = Attention(c, self.window, name="attention")(x, positions, mask)
        x = norm(c.norm_eps, name="attention_norm")(x + attended)
        return norm(c.norm_eps, name="mlp_norm")(x + MLP(c, name="mlp")(x))


BLOCKS: dict[str, Any] = {
    "sequential": Block,
    "parallel": ParallelBlock,
    "parallel_norms": ParallelNormsBlock,
    "sandwich": SandwichBlock,
    "post_norm": PostNormBlock,
}


class Transformer(nn.Module):
    """Token ids to logits. Layers are a Python loop, since their ranks may differ."""

    config: ModelConfig

    def setup(self) -> None:
        """Names the parts; see the module's docstring."""
        c = self.config
        self.embed = nn.Embed(c.vocab_size, c.embed_size or c.hidden_size)
        if c.embed_size is not None:
            self.project_in, self.project_out = Linear(c.hidden_size), Linear(c.embed_size)
        if c.position_rows is not None:
            self.positions = nn.Embed(c.position_rows, c.hidden_size)
        if c.token_types:
            self.token_types = nn.Embed(c.token_types, c.hidden_size)
        if c.embed_norm:
            self.embed_norm = NORMS[c.norm](c.norm_eps)
        block = BLOCKS[c.block]
        self.blocks = [block(c, c.window(i), name=f"layer_{i}") for i in range(c.num_layers)]
        if c.final_norm:
            self.final_norm = NORMS[c.norm](c.norm_eps)
        if c.head in TRANSFORMS:
            self.transform = TRANSFORMS[c.head](c)
        if c.head == "none":
            return
        if not c.tie_embeddings:
            self.head = Linear(c.num_classes or c.vocab_size, c.head_bias)
        elif c.head_bias:
            self.head = Bias()

    def __call__(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"] | None = None,
        token_types: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "..."]:
        """Logits ``[b, s, vocab]`` or ``[b, classes]`` in float32; without a head the stream.

        A causal model predicts the next token at every position, a masked one that very token.
        """
        return self.unembed(self.hidden(tokens, mask, token_types))

    def hidden(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"] | None = None,
        token_types: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """The residual stream after the last block.

        With a cache the tokens' ``positions`` have to be given, rising by one from column to
        column; what is behind the cache's capacity overwrites its end.
        """
        x = self.embed_tokens(tokens, mask, token_types, positions)
        positions = default_positions(tokens, mask) if positions is None else positions
        for block in self.blocks:
            x = block(x, positions, mask)
        return x

    def embed_tokens(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"] | None = None,
        token_types: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """The residual stream before the first block; token types are 0 where none are given.

        Raises:
          ValueError: if there are more tokens than learned positions, or types but no table.
        """
        c = self.config
        x = self.embed(tokens) * c.embedding_scale
        if token_types is not None and not c.token_types:
            raise ValueError("token types are given, but this model has none")
        if c.embed_size is not None:
            x = self.project_in(x)
        if c.token_types:
            x = x + self.token_types(jnp.zeros_like(tokens) if token_types is None else token_types)
        if c.position_rows is not None:
            positions = default_positions(tokens, mask) if positions is None else positions
            x = self._add_positions(x, positions)
        return self.embed_norm(x) if c.embed_norm else x

    def _add_positions(
        self, x: Float[Array, "b s m"], positions: Int[Array, "#b s"]
    ) -> Float[Array, "b s m"]:
        """Adds the learned positions."""
        c = self.config
        rows = c.position_rows or 0
        if x.shape[1] > rows - c.position_offset:
            raise ValueError(
                f"{x.shape[1]} tokens, but the model has learned "
                f"{rows - c.position_offset} positions; use shorter windows"
            )
        added = self.positions(positions + c.position_offset)
        return x + jnp.broadcast_to(added, x.shape)

    def unembed(self, x: Float[Array, "b s m"]) -> Float[Array, "..."]:
        """Logits from the residual stream after the last block."""
        c = self.config
        if c.final_norm:
            x = self.final_norm(x)
        if c.embed_size is not None:
            x = self.project_out(x)
        if c.head in TRANSFORMS:
            x = self.transform(x)
        if c.head == "none":
            return x.astype(jnp.float32)
        logits = self.embed.attend(x) if c.tie_embeddings else self.head(x)
        if c.tie_embeddings and c.head_bias:
            logits = self.head(logits)
        return softcap(logits.astype(jnp.float32), c.final_softcap)


def default_positions(tokens: Any, mask: Any = None) -> Int[Array, "#b s"]:
    """Positions ``0, 1, …`` of the tokens that the mask keeps (all, if there is none)."""
    if mask is None:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def init(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Random parameters, for tests and shapes (``jax.eval_shape``)."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return dict(Transformer(config).init(key, tokens)["params"])
