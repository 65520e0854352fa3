"""Defines what a row of the table of architectures says, and the parts that rows share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.layouts import Heads

Layout = Callable[[np.ndarray, Heads], np.ndarray]
Config = Mapping[str, Any]


class Key(NamedTuple):
    """The config key that a metadata key becomes, its type, and whether it must be there."""

    name: str
    kind: type = int
    required: bool = True


class RopeKeys(NamedTuple):
    """Config keys of the rotary embedding.

    Attributes:
      theta: key of the base of the frequencies.
      share: key of the rotated fraction of a head; None: all columns are rotated.
    """

    theta: str = "rope_theta"
    share: str | None = None


_PLAIN = RopeKeys()


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A GGUF architecture: which Hugging Face model it is, and how it is turned into one.

    Attributes:
      model_type: the family, a key of `families.registry.FAMILIES`.
      hf_class: its class, the value of ``architectures`` in ``config.json``.
      tensors: dict from a tensor's name to its Hugging Face name, both without ``.weight`` and
        ``.bias``; names of a block have no ``blk.3.``, and ``{i}`` for its number.
      keys: dict from a metadata key, without the architecture, to a config key.
      layouts: dict from a tensor, as in ``tensors``, to the function that turns its values.
      rope: config keys of the rotary embedding; None: no rotary positions.
      head_dim: whether ``config.json`` has the size of a head.
      derive: function of the facts and the config so far that returns further config keys.
      derived: metadata keys that ``derive`` reads.
      pre_tokenizer: value of ``tokenizer.ggml.pre`` for old files that have none; None: unknown.
    """

    model_type: str
    hf_class: str
    tensors: Mapping[str, str]
    keys: Mapping[str, Key]
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)
    rope: RopeKeys | None = _PLAIN
    head_dim: bool = True
    derive: Callable[[Facts, Config], Config] | None = None
    derived: frozenset[str] = frozenset()
    pre_tokenizer: str | None = None

    @property
    def hidden_size(self) -> str:
        """Config key of the width of the residual stream."""
        return self.keys["embedding_length"].name

    @property
    def num_heads(self) -> str:
        """Config key of the number of query heads."""
        return self.keys["attention.head_count"].name

    @property
    def max_positions(self) -> str:
        """Config key of the longest sequence."""
        return self.keys["context_length"].name


SIZES = {
    "block_count": Key("num_hidden_layers"),
    "context_length": Key("max_position_embeddings"),
    "embedding_length": Key("hidden_size"),
    "feed_forward_length": Key("intermediate_size"),
    "attention.head_count": Key("num_attention_heads"),
    "attention.head_count_kv": Key("num_key_value_heads", required=False),
}
RMS = {"attention.layer_norm_rms_epsilon": Key("rms_norm_eps", float)}
WINDOW = {"attention.sliding_window": Key("sliding_window", required=False)}


def in_layers(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    """Puts the prefix of a block before the Hugging Face names of its tensors."""
    return {own: f"{prefix}.{{i}}.{name}" for own, name in names.items()}


OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
LAYER_NORM = "attention.layer_norm_epsilon"


def attention_bias(facts: Facts, config: Config) -> Config:
    """Returns whether queries have biases, for `Architecture.derive`."""
    del config
    return {"attention_bias": facts.has("attn_q.bias")}
