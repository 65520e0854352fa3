"""What a model is, apart from its weights: the fields by which families differ.

Everything here is a plain number, string or tuple, so that a config is hashable (it is a static
argument of ``jax.jit``) and can be written to JSON and back.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base and how the frequencies are stretched.

    Field names are those of Hugging Face's ``rope_parameters``; fields that a scaling kind does
    not use stay at their default.
    """

    theta: float = 10_000.0  # base of the geometric series of frequencies
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope
    factor: float = 1.0  # how many times longer than trained the context is
    original_max_positions: int | None = None  # length of training, before stretching
    low_freq_factor: float = 1.0  # llama3: below this many turns, stretch fully
    high_freq_factor: float = 4.0  # llama3: above this many turns, do not stretch
    beta_fast: float = 32.0  # yarn: turns above which a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which a frequency is stretched
    attention_factor: float | None = None  # yarn, longrope: scale of cos and sin; None = by factor
    mscale: float | None = None  # yarn: DeepSeek's variant of the attention factor
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: round the ends of the ramp to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: stretch per pair up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: stretch per pair beyond it
    size: int | None = None  # columns of a head that turn, in its first pairs; None: all


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Static description of a model; `conversions.families` lists which.

    Sizes that compression may change (head width, MLP width, ranks) are read from the parameters
    when the model runs; the sizes here are those of the original model.
    """

    vocab_size: int
    hidden_size: int  # width of the residual stream
    mlp_size: int  # width inside the MLP
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; num_heads is a multiple
    head_size: int  # width of one head; the softmax scale is 1/sqrt of it
    max_positions: int  # longest sequence the model was made for
    block: str = "sequential"  # a key of models.transformer.BLOCKS
    norm: str = "rms"  # a key of models.layers.NORMS
    norm_eps: float = 1e-6
    activation: str = "silu"  # a key of models.layers.ACTIVATIONS
    gated: bool = True  # MLP: down(act(gate) * up); else down(act(up))
    rope: Rope | None = Rope()  # None: no rotary positions
    position_rows: int | None = None  # learned positions: rows of their table; None: there are none
    position_offset: int = 0  # row of the first position
    causal: bool = True  # a token sees those before it; False: all that are no padding
    final_norm: bool = True  # a norm behind the last block
    embed_size: int | None = None  # columns of the embedding, projected in and out; None: all
    embed_norm: bool = False  # a norm before the first block
    token_types: int = 0  # rows of the table of token types; 0: there are none
    head: str = "causal"  # causal | masked (language models) | classes | none (residual stream)
    head_activation: str = "gelu"  # masked: a key of models.layers.ACTIVATIONS
    num_classes: int | None = None  # of a head that classifies
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False  # the head is the transposed embedding
    head_bias: bool = False  # of the head's last layer
    windows: tuple[int | None, ...] | None = None  # per layer: sliding window; None = full
    qk_norm: bool = False  # RMS norm over each head of queries and keys, before they turn
    embedding_scale: float = 1.0  # factor on the token embeddings
    attention_scale: float | None = None  # factor on queries @ keys; None: 1/sqrt(head_size)
    attention_softcap: float | None = None  # c: attention logits x become c·tanh(x/c)
    final_softcap: float | None = None  # likewise the model's logits
    local_rope: Rope | None = None  # of layers with a sliding window; None: `rope`

    def window(self, layer: int) -> int | None:
        """Number of positions a token of ``layer`` sees back, itself included; None = all."""
        return None if self.windows is None else self.windows[layer]

    def to_json(self) -> dict[str, Any]:
        """The config as JSON-serialisable nested dicts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`.

        Raises:
          TypeError: if a field is unknown or missing.
        """
        fields = dict(fields)
        for name in ("rope", "local_rope"):
            if fields.get(name) is not None:
                rope: dict[str, Any] = dict(fields[name])
                factors: dict[str, Any] = {
                    k: tuple(v) for k, v in rope.items() if isinstance(v, list)
                }
                fields[name] = Rope(**(rope | factors))
        if fields.get("windows") is not None:
            fields["windows"] = tuple(fields["windows"])
        return cls(**fields)
