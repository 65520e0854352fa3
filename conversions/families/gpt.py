"""Families derived from GPT-2: GPT-2, GPT-BigCode, OPT and CodeGen.

All have layer norms with biases and MLPs without a gate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lordjax.conversions.families.family import (
    BIAS_FIELDS,
    BLOCK,
    HEAD,
    Family,
    TensorRow,
    Values,
    decoder_heads,
    fused,
    linear,
    norm,
)
from lordjax.conversions.families.neox import by_heads
from lordjax.conversions.families.rope import half_split, no_rope
from lordjax.conversions.families.sliding_windows import no_windows
from lordjax.models.config import ModelConfig, Rope

ALL_BIASES = dict.fromkeys(BIAS_FIELDS, True)
_H = "transformer.h.{i}"
GPT2 = Family(
    model_type="gpt2",
    architectures=(
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2Model",
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "mlp_size": "n_inner",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
    },
    constants={"norm": "layer", "gated": False, **ALL_BIASES},
    defaults={
        "vocab_size": 50257,
        "n_embd": 768,
        "n_inner": None,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    fixed={"scale_attn_by_inverse_layer_idx": (False,)},
    windows=no_windows,
    rope=no_rope,
    position_offset=0,
    prefix="transformer.",
    tensors=(
        TensorRow("embed/embedding", "transformer.wte.weight", "vm"),
        TensorRow("positions/embedding", "transformer.wpe.weight", "pm"),
        *norm(f"{BLOCK}/attention_norm", f"{_H}.ln_1"),
        *fused(f"{BLOCK}/attention", "qkv", f"{_H}.attn.c_attn", "ma", "qkv_bias"),
        *linear(f"{BLOCK}/attention/o", f"{_H}.attn.c_proj", "hm", "out_bias", conv1d=True),
        *norm(f"{BLOCK}/mlp_norm", f"{_H}.ln_2"),
        *linear(f"{BLOCK}/mlp/up", f"{_H}.mlp.c_fc", "mf", "mlp_bias", conv1d=True),
        *linear(f"{BLOCK}/mlp/down", f"{_H}.mlp.c_proj", "fm", "mlp_bias", conv1d=True),
        *norm("final_norm", "transformer.ln_f"),
    ),
    heads=decoder_heads(tokens="classifier"),
    # Old versions saved the causal mask and its constant.
    ignored_tensors=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)


def _key_heads(hf_config: Values, values: Values, problems: list[str]) -> dict[str, Any]:
    """Returns the number of key/value heads: 1 with multi-query attention, else ``n_head``."""
    del hf_config
    heads = 1 if values["multi_query"] else values["n_head"]
    if values["num_key_value_heads"] not in (None, heads):
        problems.append(
            f"num_key_value_heads = {values['num_key_value_heads']!r}: only {heads} is supported "
            f"with multi_query {values['multi_query']}"
        )
    return {"num_kv_heads": heads}


Columns = Callable[[ModelConfig], Any]


def _one_of(shared: Columns, own: Columns, config: ModelConfig) -> Any:
    """Returns the outputs in the fused layer, whose order depends on multi-query attention."""
    return (shared if config.num_kv_heads == 1 else own)(config)


GPT_BIGCODE = dataclasses.replace(
    GPT2,
    model_type="gpt_bigcode",
    architectures=(
        "GPTBigCodeForCausalLM",
        "GPTBigCodeForSequenceClassification",
        "GPTBigCodeForTokenClassification",
        "GPTBigCodeModel",
    ),
    defaults={
        **GPT2.defaults,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
        "num_key_value_heads": None,
    },
    derive=_key_heads,
    tensors=(
        *(row for row in GPT2.tensors if ".attn." not in row.name and ".mlp." not in row.name),
        *(
            shared._replace(columns=functools.partial(_one_of, shared.columns, own.columns))
            for shared, own in zip(
                fused(f"{BLOCK}/attention", "qkv", f"{_H}.attn.c_attn", "am", "qkv_bias"),
                by_heads(f"{_H}.attn.c_attn", "am", "qkv_bias"),
                strict=True,
            )
        ),
        *linear(f"{BLOCK}/attention/o", f"{_H}.attn.c_proj", "mh", "out_bias"),
        *linear(f"{BLOCK}/mlp/up", f"{_H}.mlp.c_fc", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_H}.mlp.c_proj", "mf", "mlp_bias"),
    ),
)


def _opt_shape(hf_config: Values, values: Values, problems: list[str]) -> Mapping[str, Any]:
    """Returns the kind of block, whether there is a final norm, and the embedding's width.

    OPT-350m projects its embeddings, normalises after its layers and has no final norm. Checkpoints
    that were fine-tuned with old code have no final norm either.
    """
    del hf_config
    width, before = values["word_embed_proj_dim"], values["do_layer_norm_before"]
    if width is not None and (type(width) is not int or width < 1):
        problems.append(f"word_embed_proj_dim = {width!r}: expected a positive integer or null")
    return {
        "block": "sequential" if before else "post_norm",
        "final_norm": before and not values["_remove_final_layer_norm"],
        "embed_size": None if width == values["hidden_size"] else width,
    }


_D = "model.decoder.layers.{i}"
OPT = Family(
    model_type="opt",
    architectures=(
        "OPTForCausalLM",
        "OPTForSequenceClassification",
        "OPTModel",
    ),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "mlp_size": "ffn_dim",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        **dict.fromkeys(BIAS_FIELDS, "enable_bias"),
    },
    constants={"norm": "layer", "norm_eps": 1e-5, "gated": False},
    defaults={
        "vocab_size": 50272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "enable_bias": True,
        "word_embed_proj_dim": None,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
    },
    windows=no_windows,
    rope=no_rope,
    position_offset=2,
    derive=_opt_shape,
    ignored_tensors=(r"model\.decoder\.version",),
    tensors=(
        TensorRow("embed/embedding", "model.decoder.embed_tokens.weight", "vw"),
        TensorRow(
            "project_in/kernel", "model.decoder.project_in.weight", "mw", True, when="embed_size"
        ),
        TensorRow("positions/embedding", "model.decoder.embed_positions.weight", "pm"),
        *norm(f"{BLOCK}/attention_norm", f"{_D}.self_attn_layer_norm"),
        *linear(f"{BLOCK}/attention/q", f"{_D}.self_attn.q_proj", "hm", "qkv_bias"),
        *linear(f"{BLOCK}/attention/k", f"{_D}.self_attn.k_proj", "km", "qkv_bias"),
        *linear(f"{BLOCK}/attention/v", f"{_D}.self_attn.v_proj", "km", "qkv_bias"),
        *linear(f"{BLOCK}/attention/o", f"{_D}.self_attn.out_proj", "mh", "out_bias"),
        *norm(f"{BLOCK}/mlp_norm", f"{_D}.final_layer_norm"),
        *linear(f"{BLOCK}/mlp/up", f"{_D}.fc1", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_D}.fc2", "mf", "mlp_bias"),
        *(
            row._replace(when="final_norm")
            for row in norm("final_norm", "model.decoder.final_layer_norm")
        ),
        TensorRow(
            "project_out/kernel", "model.decoder.project_out.weight", "wm", True, when="embed_size"
        ),
    ),
    heads={
        "causal": (HEAD._replace(dims="vw"),),
        "classes": (TensorRow("head/kernel", "score.weight", "cw", True),),
    },
)


def _codegen_rope(hf_config: Values, values: Values, problems: list[str]) -> Rope:
    """Reads ``rotary_dim``, the number of rotated columns of a head; null means all."""
    del hf_config
    size, heads = values["rotary_dim"], values["n_head"]
    width = values["n_embd"] // heads if heads else 0
    if size is not None and not (0 < size <= width and size % 2 == 0):
        problems.append(f"rotary_dim = {size!r}: expected an even number up to {width} or null")
    if heads % _CODEGEN_PARTS:
        problems.append(f"n_head = {heads!r}: expected a multiple of {_CODEGEN_PARTS}")
    return Rope(size=size)


# CodeGen's fused layer concatenates the weights of 4 accelerators, each of which holds q, v, k.
_CODEGEN_PARTS = 4


def _codegen_columns(layer: str, config: ModelConfig) -> np.ndarray:
    """Returns the outputs of a layer in CodeGen's fused layer, rotary pairs half a head apart.

    The fused layer stores the columns of a rotary pair as neighbours.
    """
    count = config.num_heads * config.head_size
    each = count // _CODEGEN_PARTS
    first = each * (3 * np.arange(_CODEGEN_PARTS) + "qvk".index(layer))
    columns = (first[:, None] + np.arange(each)).reshape(config.num_heads, config.head_size)
    if layer != "v" and config.rope is not None:
        columns = columns[:, half_split(config.head_size, config.rope.size)]
    return columns.reshape(-1)


CODEGEN = dataclasses.replace(
    GPT2,
    model_type="codegen",
    architectures=(
        "CodeGenForCausalLM",
        "CodeGenModel",
    ),
    constants={
        "block": "parallel",
        "norm": "layer",
        "gated": False,
        "mlp_bias": True,
        "head_bias": True,
    },
    defaults={
        **GPT2.defaults,
        "vocab_size": 50400,
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "tie_word_embeddings": False,
    },
    fixed={},
    rope=_codegen_rope,
    position_offset=None,
    tensors=(
        TensorRow("embed/embedding", "transformer.wte.weight", "vm"),
        *norm(f"{BLOCK}/attention_norm", f"{_H}.ln_1"),
        *(
            TensorRow(
                f"{BLOCK}/attention/{layer}/kernel",
                f"{_H}.attn.qkv_proj.weight",
                "am",
                transpose=True,
                columns=functools.partial(_codegen_columns, layer),
            )
            for layer in "qkv"
        ),
        *linear(f"{BLOCK}/attention/o", f"{_H}.attn.out_proj", "mh", "out_bias"),
        *linear(f"{BLOCK}/mlp/up", f"{_H}.mlp.fc_in", "fm", "mlp_bias"),
        *linear(f"{BLOCK}/mlp/down", f"{_H}.mlp.fc_out", "mf", "mlp_bias"),
        *norm("final_norm", "transformer.ln_f"),
    ),
    heads=decoder_heads(linear("head", "lm_head", "vm", "head_bias")),
    ignored_tensors=(r"transformer\.h\.\d+\.attn\.(causal_mask|masked_bias)",),
)
