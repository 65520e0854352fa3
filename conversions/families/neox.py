"""GPT-NeoX and Pythia: queries, keys and values are fused head by head; heads are partly rotary."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from lordjax.conversions.families.family import (
    BLOCK,
    HEAD,
    Family,
    TensorRow,
    Values,
    decoder_heads,
    linear,
    norm,
)
from lordjax.conversions.families.rope import (
    ROPE_KEYS,
    half_split,
    read_rope,
    rotary_size,
    take_share,
)
from lordjax.conversions.families.sliding_windows import no_windows
from lordjax.models.config import ModelConfig, Rope


def by_heads(name: str, dims: str, bias: str) -> Iterator[TensorRow]:
    """Yields the rows of a fused layer that stores q, k and v of the first head, then the next."""
    for layer in "qkv":
        columns = functools.partial(head_columns, layer)
        for row in linear(f"{BLOCK}/attention/{layer}", name, dims, bias):
            yield row._replace(columns=columns)


def head_columns(layer: str, config: ModelConfig) -> np.ndarray:
    """Returns the outputs of a layer in the fused layer, rotary pairs half a head apart.

    The fused layer stores the columns of a rotary pair half of the rotary part apart.
    """
    first = config.head_size * (3 * np.arange(config.num_heads) + "qkv".index(layer))
    columns = first[:, None] + np.arange(config.head_size)
    if layer != "v" and config.rope is not None:
        order = half_split(config.head_size, config.rope.size, neighbours=False)
        columns = columns[:, order]
    return columns.reshape(-1)


def _rope(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads the rotary embedding of the first columns of a head."""
    plain, share = take_share(hf_config, values["rotary_pct"])
    base = plain.pop("rope_theta", None)
    if base not in (None, values["rotary_emb_base"]):
        problems.append(f"rope_theta = {base!r}, but rotary_emb_base {values['rotary_emb_base']!r}")
    if "rotary_emb_base" in hf_config:
        plain["rope_theta"] = values["rotary_emb_base"]
    size = rotary_size("rotary_pct", share, values, problems)
    return dataclasses.replace(read_rope(plain, values, problems), size=size)


def _block(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Returns the kind of block: parallel if attention and MLP read the same hidden state."""
    del hf_config, problems
    return {"block": "parallel_norms" if values["use_parallel_residual"] else "sequential"}


_LAYER = "gpt_neox.layers.{i}"
GPT_NEOX = Family(
    model_type="gpt_neox",
    architectures=(
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        "GPTNeoXForTokenClassification",
        "GPTNeoXModel",
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "mlp_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "norm_eps": "layer_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
    },
    constants={"norm": "layer", "gated": False, "mlp_bias": True},
    defaults={
        "vocab_size": 50432,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "use_parallel_residual": True,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000.0,
    },
    windows=no_windows,
    rope=_rope,
    rope_keys=ROPE_KEYS,
    derive=_block,
    prefix="gpt_neox.",
    tensors=(
        TensorRow("embed/embedding", "gpt_neox.embed_in.weight", "vm"),
        *norm(f"{BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        *by_heads(f"{_LAYER}.attention.query_key_value", "am", "qkv_bias"),
        *linear(f"{BLOCK}/attention/o", f"{_LAYER}.attention.dense", "mh", "out_bias"),
        *norm(f"{BLOCK}/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *linear(f"{BLOCK}/mlp/up", f"{_LAYER}.mlp.dense_h_to_4h", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_LAYER}.mlp.dense_4h_to_h", "mf", "mlp_bias"),
        *norm("final_norm", "gpt_neox.final_layer_norm"),
    ),
    heads=decoder_heads((HEAD._replace(name="embed_out.weight"),), tokens="classifier"),
    module_names={"embed_out.weight": "lm_head.weight"},
    # Old versions saved the causal mask, its constant and the rotary frequencies.
    ignored_tensors=(r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",),
)
