"""The model of all families: embedding, blocks, head.

Parameters (``[in, out]`` kernels; biases where the family has them)::

    embed/embedding                         [vocab, m]
    project_in/kernel                       [e, m], only if embeddings have another width
    positions/embedding                     [rows, m], only if positions are learned
    token_types/embedding                   [types, m], only in encoders
    embed_norm/{scale,bias}                 [m], only in encoders
    layer_0/attention_norm/scale            [m]; and bias, where norms have one
    layer_0/attention/{q,k,v,o}/kernel      [m, h·d] [m, k·d] [m, k·e] [h·e, m]
    layer_0/attention/rope_index            [k, d/2], only if rotary pairs were pruned
    layer_0/attention/{q,k}_norm/scale      [d], only if heads are normalized; [h·d] [k·d] at once
    layer_0/{attention,mlp}_post_norm/scale [m], only if outputs are normalized, too
    layer_0/mlp_norm/scale                  [m]
    layer_0/mlp/{gate,up,down}/kernel       [m, f] [m, f] [f, m]; gate only in gated MLPs
    final_norm/scale                        [m], absent if blocks end with a norm
    project_out/kernel                      [m, e], only with project_in
    transform/dense/kernel                  [m, m], before the head of an encoder
    transform/norm/{scale,bias}             [m], if it predicts masked tokens
    head/kernel                             [m, vocab or classes], absent when tied to the embedding

The norm before the MLP is absent where attention and MLP read the same normalized stream.

A compressed model is the same module with other leaves: sizes that compression may change are read
from the arrays. Activations whose statistics can be collected are marked with `layers.tap`.

If the collection ``cache`` is mutable, keys and values are stored in it::

    layer_0/attention/{keys,values}         [b, k, capacity, d] [b, k, capacity, e]

Column i is position i. A pass without a cache makes one with as many columns as it has tokens. A
pass with a cache writes the columns of its tokens and attends to all columns up to their positions;
see `generation.decode`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lordjax.kernels import trees
from lordjax.models.blocks import Block
from lordjax.models.config import ModelConfig
from lordjax.models.layers import NORMS, Bias, Embedding, Linear, softcap, tap
from lordjax.models.output_heads import last_token, transform_of
from lordjax.names import layer

HEAD_INPUT = "head_in"  # tap of what the last matrix reads


class Transformer(nn.Module):
    """Maps token ids to logits.

    Blocks run in a Python loop, because their ranks may differ.

    Attributes:
      config: the architecture.
    """

    config: ModelConfig

    def setup(self) -> None:
        """Builds the layers; their names are those of the module's docstring."""
        c = self.config
        self.embed = Embedding(c.vocab_size, c.embed_size or c.hidden_size)
        if c.embed_size is not None:
            self.project_in, self.project_out = Linear(c.hidden_size), Linear(c.embed_size)
        if c.position_rows is not None:
            self.positions = Embedding(c.position_rows, c.hidden_size)
        if c.token_types:
            self.token_types = Embedding(c.token_types, c.hidden_size)
        if c.embed_norm:
            self.embed_norm = NORMS[c.norm](c.norm_eps)
        self.blocks = [Block(c, c.window(i), name=layer(i)) for i in range(c.num_layers)]
        if c.final_norm:
            self.final_norm = NORMS[c.norm](c.norm_eps)
        if (transform := transform_of(c)) is not None:
            self.transform = transform(c)
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
        """Computes the logits. A causal model predicts the next token, a masked one the same token.

        Args:
          tokens: token ids.
          mask: False at padding, which no token sees; None: there is no padding.
          token_types: type of every token, for encoders; None: 0.

        Returns:
          Float32 logits ``[b, s, vocab]``, ``[b, s, classes]`` or ``[b, classes]``; without a head,
          the residual stream after the final norm.
        """
        return self.unembed(self.hidden(tokens, mask, token_types), mask)

    def hidden(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"] | None = None,
        token_types: Int[Array, "b s"] | None = None,
        positions: Int[Array, "b s"] | None = None,
    ) -> Float[Array, "b s m"]:
        """Computes the residual stream after the last block.

        Args:
          tokens: token ids.
          mask: False at padding, which no token sees; None: there is no padding.
          token_types: type of every token, for encoders; None: 0.
          positions: position of every token; None: see `default_positions`. With a cache they are
            required, and rise by one from column to column. Positions beyond the cache's capacity
            overwrite its last columns.
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
        """Computes the residual stream before the first block; arguments as for `hidden`.

        Raises:
          ValueError: if there are more tokens than learned positions, or token types are given but
            the model has no table of them.
        """
        c = self.config
        x = self.embed(tokens) * c.embedding_scale
        if token_types is not None and not c.token_types:
            raise ValueError("token types are given, but this model has none; leave them out")
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
        """Adds the embeddings of learned positions."""
        c = self.config
        rows = c.position_rows or 0
        if x.shape[1] > rows - c.position_offset:
            raise ValueError(
                f"sequences of {x.shape[1]} tokens, but the model has learned "
                f"{rows - c.position_offset} positions; use shorter sequences"
            )
        added = self.positions(positions + c.position_offset)
        return x + jnp.broadcast_to(added, x.shape)

    def unembed(
        self, x: Float[Array, "b s m"], mask: Bool[Array, "b s"] | None = None
    ) -> Float[Array, "..."]:
        """Computes the logits from the residual stream after the last block.

        Args:
          x: residual stream after the last block.
          mask: False at padding; only a causal classifier reads it, to find the last token.
        """
        c = self.config
        if c.final_norm:
            x = self.final_norm(x)
        if c.embed_size is not None:
            x = self.project_out(x)
        if c.head == "classes" and c.causal:
            x = last_token(x, mask)
        if transform_of(c) is not None:
            x = self.transform(x)
        if c.head == "none":
            return x.astype(jnp.float32)
        x = tap(self, HEAD_INPUT, x)
        logits = self.embed.scores(x) if c.tie_embeddings else self.head(x)
        if c.tie_embeddings and c.head_bias:
            logits = self.head(logits)
        if c.logit_scale != 1:
            logits = logits * c.logit_scale
        return softcap(logits.astype(jnp.float32), c.final_softcap)


def default_positions(tokens: Any, mask: Any = None) -> Int[Array, "#b s"]:
    """Returns positions ``0, 1, …``; with a mask, padding is not counted."""
    if mask is None:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def init(config: ModelConfig, key: Array) -> dict[str, Any]:
    """Returns random parameters, for tests and shapes (``jax.eval_shape``)."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return dict(Transformer(config).init(key, tokens)["params"])


@functools.cache
def parameter_shapes(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the shapes of the original model's parameters; its blocks are all alike.

    Args:
      config: the architecture.

    Returns:
      path -> ``ShapeDtypeStruct`` of the parameters outside the blocks, and, by the path inside a
      block, of those of any block.
    """
    windows = None if config.windows is None else config.windows[:1]
    one = dataclasses.replace(config, num_layers=1, windows=windows)
    table = trees.flatten(jax.eval_shape(functools.partial(init, one), jax.random.key(0)))
    start = f"{layer(0)}/"
    rest = {path: leaf for path, leaf in table.items() if not path.startswith(start)}
    block = {path.removeprefix(start): table[path] for path in table if path.startswith(start)}
    return rest, block
