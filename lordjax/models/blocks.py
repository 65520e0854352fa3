"""Transformer blocks: the MLP, and the arrangements of norms, attention and MLP."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from lordjax.models.attention import Attention
from lordjax.models.config import ModelConfig
from lordjax.models.layers import ACTIVATIONS, NORMS, Linear, tap


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
