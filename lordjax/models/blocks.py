"""Transformer blocks: the MLP, and the arrangements of norms, attention and MLP."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from lordjax.models.attention import Attention
from lordjax.models.config import ModelConfig
from lordjax.models.layers import ACTIVATIONS, NORMS, Linear, tap


class MLP(nn.Module):
    """MLP: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` if it has no gate."""

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


class Arrangement(NamedTuple):
    """How a block combines its norms, attention and MLP.

    Attributes:
      parallel: attention and MLP both read the block's input; else the MLP reads what attention
        has added to it.
      shared_norm: a parallel block's MLP reads what attention reads; there is no ``mlp_norm``.
      norm_input: attention and MLP read normalized inputs.
      norm_output: the outputs of attention and MLP are normalized before they are added.
      norm_sum: the sums are normalized.
    """

    parallel: bool = False
    shared_norm: bool = False
    norm_input: bool = True
    norm_output: bool = False
    norm_sum: bool = False


BLOCKS = {
    # Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)).
    "sequential": Arrangement(),
    # GPT-J, CodeGen: x + attention(norm(x)) + mlp(norm(x)) with one norm.
    "parallel": Arrangement(parallel=True, shared_norm=True),
    # GPT-NeoX: x + attention(norm(x)) + mlp(norm(x)) with two norms.
    "parallel_norms": Arrangement(parallel=True),
    # Gemma 2: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))).
    "sandwich": Arrangement(norm_output=True),
    # OLMo 2: x + norm(attention(x)), then x + norm(mlp(x)).
    "output_norm": Arrangement(norm_input=False, norm_output=True),
    # BERT, OPT-350m: norm(x + attention(x)), then norm(x + mlp(x)).
    "post_norm": Arrangement(norm_input=False, norm_sum=True),
}


class Block(nn.Module):
    """A transformer block, arranged as ``BLOCKS[config.block]`` says.

    A block runs on its own sub-dict of the parameters, so that calibration can stream blocks:
    ``Block(config).apply({"params": params["layer_3"]}, x, positions)``.

    Attributes:
      config: the architecture.
      window: sliding window of attention, in tokens; None: attention sees every position.
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
        """Maps the residual stream before the block to the one after it.

        Args:
          x: residual stream before the block.
          positions: position of every token.
          mask: False at padding, which no token sees; None: there is no padding.

        Returns:
          Residual stream after the block.
        """
        c, how = self.config, BLOCKS[self.config.block]

        def norm(name: str, applies: bool, z: Array) -> Array:
            return NORMS[c.norm](c.norm_eps, name=name)(z) if applies else z

        def scaled(z: Array) -> Array:
            return z if c.residual_scale == 1 else z * c.residual_scale

        h = norm("attention_norm", how.norm_input, x)
        attended = Attention(c, self.window, name="attention")(h, positions, mask)
        if how.parallel and not how.shared_norm:
            h = norm("mlp_norm", how.norm_input, x)
        x = x + scaled(norm("attention_post_norm", how.norm_output, attended))
        x = norm("attention_norm", how.norm_sum, x)
        if not how.parallel:
            h = norm("mlp_norm", how.norm_input, x)
        x = x + scaled(norm("mlp_post_norm", how.norm_output, MLP(c, name="mlp")(h)))
        return norm("mlp_norm", how.norm_sum, x)
