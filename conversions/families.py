"""Families of Hugging Face models: the one place that knows how they differ.

A family is a row of `FAMILIES`: how its ``config.json`` becomes a `ModelConfig`, and which tensor
of its checkpoints is which of our parameters. A new family is a new row; see `family.Family`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from lordjax.conversions.family import (
    Family,
    TensorRow,
    TensorSource,
    Values,
    fill_and_check_sizes,
    mixed_windows,
    no_windows,
    one_window,
    read_keys,
    sizes_of,
)
from lordjax.conversions.rope import read_rope
from lordjax.models.config import ModelConfig


def family_of(hf_config: Values, where: str = "config.json") -> Family:
    """The row of a ``config.json``.

    Args:
      hf_config: its content.
      where: how error messages call it.

    Raises:
      ValueError: if the family or its head is not supported; lists what is.
    """
    kind = hf_config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    given = hf_config.get("architectures") or list(family.architectures)
    if not set(given) <= set(family.architectures):
        raise ValueError(
            f"{where}: architectures {given} is not supported; "
            f"supported for {kind}: {', '.join(family.architectures)}"
        )
    return family


def model_config(hf_config: Values, where: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a ``config.json``.

    Args:
      hf_config: its content; configs of transformers 4 and 5 are both read.
      where: how error messages call it.

    Raises:
      ValueError: if a key or value is not understood; one error lists all of them.
    """
    family = family_of(hf_config, where)
    problems: list[str] = []
    values = read_keys(family, hf_config, problems)
    rope = read_rope(hf_config, values, problems) if family.rotary else None
    windows = family.windows(values, problems)
    fields = dict(family.constants) | {f: values[key] for f, key in family.fields.items()}
    fill_and_check_sizes(fields, family.rotary, problems)
    if family.check is not None:
        family.check(values, problems)
    if problems:
        raise ValueError(
            f"{where}: {len(problems)} thing(s) in it are not understood, so the converted model "
            f"would be another one (family {family.model_type}):\n  " + "\n  ".join(problems)
        )
    if family.position_offset is not None:
        fields["position_offset"] = family.position_offset
        fields["position_rows"] = fields["max_positions"] + family.position_offset
    return ModelConfig(**fields, rope=rope, windows=windows)


def tensor_table(hf_config: Values, where: str = "config.json") -> dict[str, TensorSource]:
    """Our parameter path -> the tensor of a checkpoint with this ``config.json``."""
    family, config = family_of(hf_config, where), model_config(hf_config, where)
    sizes = sizes_of(config)
    table = {}
    for row in family.tensors:
        if row.when and getattr(config, row.when.removeprefix("not ")) == ("not " in row.when):
            continue
        shape, part = tuple(sizes[letter] for letter in row.dims), None
        if row.part is not None:
            before, own = (sum(sizes[letter] for letter in letters) for letters in row.part)
            part = (before, before + own)
        for i in range(config.num_layers if "{i}" in row.path else 1):
            path, name = row.path.format(i=i), row.name.format(i=i)
            table[path] = TensorSource(name, shape, row.transpose, part)
    return table


def _linear(
    path: str, name: str, dims: str, bias: str, *, conv1d: bool = False
) -> tuple[TensorRow, TensorRow]:
    """A linear layer's two rows, of which the second holds where the model has biases.

    ``nn.Linear`` is ``[out, in]``, the ``Conv1D`` of GPT-2 ``[in, out]``.
    """
    out = dims[1] if conv1d else dims[0]
    return (
        TensorRow(f"{path}/kernel", f"{name}.weight", dims, transpose=not conv1d),
        TensorRow(f"{path}/bias", f"{name}.bias", out, when=bias),
    )


# Layers that are stored as one -> the outputs of each, in letters of `sizes_of`.
_PARTS = {"q": "h", "k": "k", "v": "k", "gate": "f", "up": "f"}


def _fused(
    path: str, layers: Iterable[str], name: str, dims: str, bias: str
) -> Iterator[TensorRow]:
    """Rows of layers whose outputs are stored one after the other in one; ``m`` is the input."""
    before = ""
    for layer in layers:
        for row in _linear(f"{path}/{layer}", name, dims, bias, conv1d=dims[0] == "m"):
            yield row._replace(part=(before, _PARTS[layer]))
        before += _PARTS[layer]


def _norm(path: str, name: str) -> tuple[TensorRow, TensorRow]:
    """A norm with a bias."""
    return (
        TensorRow(f"{path}/scale", f"{name}.weight", "m"),
        TensorRow(f"{path}/bias", f"{name}.bias", "m"),
    )


_BLOCK, _LAYER = "layer_{i}", "model.layers.{i}"
LLAMA = Family(
    model_type="llama",
    architectures=("LlamaForCausalLM",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "mlp_size": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "activation": "hidden_act",
        "tie_embeddings": "tie_word_embeddings",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    constants={},
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    fixed={
        "rope_interleaved": (False,),
        "partial_rotary_factor": (1.0, None),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({}, None),
        "per_layer_config": (None, {}),
    },
    windows=no_windows,
    tensors=(
        TensorRow("embed/embedding", "model.embed_tokens.weight", "vm"),
        TensorRow(f"{_BLOCK}/attention_norm/scale", f"{_LAYER}.input_layernorm.weight", "m"),
        *_linear(f"{_BLOCK}/attention/q", f"{_LAYER}.self_attn.q_proj", "hm", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/k", f"{_LAYER}.self_attn.k_proj", "km", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/v", f"{_LAYER}.self_attn.v_proj", "km", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/o", f"{_LAYER}.self_attn.o_proj", "mh", "out_bias"),
        TensorRow(f"{_BLOCK}/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight", "m"),
        *_linear(f"{_BLOCK}/mlp/gate", f"{_LAYER}.mlp.gate_proj", "fm", "mlp_bias"),
        *_linear(f"{_BLOCK}/mlp/up", f"{_LAYER}.mlp.up_proj", "fm", "mlp_bias"),
        *_linear(f"{_BLOCK}/mlp/down", f"{_LAYER}.mlp.down_proj", "mf", "mlp_bias"),
        TensorRow("final_norm/scale", "model.norm.weight", "m"),
        TensorRow("head/kernel", "lm_head.weight", "vm", True, when="not tie_embeddings"),
    ),
    # Frequencies that old versions of transformers saved; they follow from the config.
    ignored_tensors=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)

_NO_BIASES = {"attention_bias": (False,), "mlp_bias": (False,)}
_BIAS_FIELDS = ("qkv_bias", "out_bias", "mlp_bias")
_UNBIASED: dict[str, Any] = {
    "fields": {f: key for f, key in LLAMA.fields.items() if f not in _BIAS_FIELDS},
    "fixed": {**LLAMA.fixed, **_NO_BIASES},
}
_READ = {k: v for k, v in LLAMA.defaults.items() if k not in _NO_BIASES}

MISTRAL = dataclasses.replace(
    LLAMA,
    **_UNBIASED,
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    defaults={
        **_READ,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    windows=one_window,
)

QWEN2 = dataclasses.replace(
    LLAMA,
    fields=_UNBIASED["fields"],
    # Text-only checkpoints that say they do not use Qwen2-VL's rotary embedding.
    fixed={**_UNBIASED["fixed"], "use_mrope": (False,)},
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    constants={"qkv_bias": True},
    defaults={
        **_READ,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    windows=mixed_windows,
)

PHI3 = dataclasses.replace(
    MISTRAL,
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    fields={f: key for f, key in MISTRAL.fields.items() if f != "head_size"},
    defaults={
        **{k: v for k, v in _READ.items() if k != "head_dim"},
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    ignored=frozenset(("resid_pdrop", "embd_pdrop")),
    tensors=(
        *(
            row
            for row in LLAMA.tensors
            if ".self_attn." not in row.name and ".mlp." not in row.name
        ),
        *_fused(f"{_BLOCK}/attention", "qkv", f"{_LAYER}.self_attn.qkv_proj", "am", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/o", f"{_LAYER}.self_attn.o_proj", "mh", "out_bias"),
        *_fused(f"{_BLOCK}/mlp", ("gate", "up"), f"{_LAYER}.mlp.gate_up_proj", "gm", "mlp_bias"),
        *_linear(f"{_BLOCK}/mlp/down", f"{_LAYER}.mlp.down_proj", "mf", "mlp_bias"),
    ),
)

_ALL_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
STARCODER2 = dataclasses.replace(
    LLAMA,
    model_type="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    fields={
        **{f: key for f, key in LLAMA.fields.items() if f != "head_size"},
        "norm_eps": "norm_epsilon",
        **dict.fromkeys(_BIAS_FIELDS, "use_bias"),
    },
    constants={"norm": "layer", "gated": False},
    defaults={
        **{k: v for k, v in _READ.items() if k not in ("head_dim", "rms_norm_eps")},
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    fixed={**LLAMA.fixed, "norm_type": ("layer_norm",), "mlp_type": ("default",)},
    ignored=frozenset(("residual_dropout", "embedding_dropout")),
    windows=one_window,
    tensors=(
        *(row for row in LLAMA.tensors if "_norm/" not in row.path and "/mlp/" not in row.path),
        *_norm(f"{_BLOCK}/attention_norm", f"{_LAYER}.input_layernorm"),
        *_norm(f"{_BLOCK}/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *_linear(f"{_BLOCK}/mlp/up", f"{_LAYER}.mlp.c_fc", "fm", "mlp_bias"),
        *_linear(f"{_BLOCK}/mlp/down", f"{_LAYER}.mlp.c_proj", "mf", "mlp_bias"),
        *_norm("final_norm", "model.norm"),
    ),
)

# Dropout, heads for other tasks, the precision of the attention.
_GPT2_IGNORED = """
    n_ctx resid_pdrop embd_pdrop attn_pdrop reorder_and_upcast_attn summary_type summary_use_proj
    summary_activation summary_proj_to_labels summary_first_dropout
"""
# The precision of the softmax, and how an old inference server allotted memory.
_BIGCODE_IGNORED = """
    attention_softmax_in_fp32 scale_attention_softmax_in_fp32 inference_runner max_batch_size
    validate_runner_input pre_allocate_kv_cache pad_key_length
"""
_HEAD = TensorRow("head/kernel", "lm_head.weight", "vm", True, when="not tie_embeddings")
_H = "transformer.h.{i}"
GPT2 = Family(
    model_type="gpt2",
    architectures=("GPT2LMHeadModel",),
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
    constants={"norm": "layer", "gated": False, **_ALL_BIASES},
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
    fixed={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({}, None),
    },
    windows=no_windows,
    ignored=frozenset(_GPT2_IGNORED.split()),
    rotary=False,
    position_offset=0,
    prefix="transformer.",
    tensors=(
        TensorRow("embed/embedding", "transformer.wte.weight", "vm"),
        TensorRow("positions/embedding", "transformer.wpe.weight", "pm"),
        *_norm(f"{_BLOCK}/attention_norm", f"{_H}.ln_1"),
        *_fused(f"{_BLOCK}/attention", "qkv", f"{_H}.attn.c_attn", "ma", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/o", f"{_H}.attn.c_proj", "hm", "out_bias", conv1d=True),
        *_norm(f"{_BLOCK}/mlp_norm", f"{_H}.ln_2"),
        *_linear(f"{_BLOCK}/mlp/up", f"{_H}.mlp.c_fc", "mf", "mlp_bias", conv1d=True),
        *_linear(f"{_BLOCK}/mlp/down", f"{_H}.mlp.c_proj", "fm", "mlp_bias", conv1d=True),
        *_norm("final_norm", "transformer.ln_f"),
        _HEAD,
    ),
    # The causal mask and its constant, saved by old versions.
    ignored_tensors=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)

GPT_BIGCODE = dataclasses.replace(
    GPT2,
    model_type="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    constants={**GPT2.constants, "num_kv_heads": 1},
    defaults={**GPT2.defaults, "activation_function": "gelu_pytorch_tanh"},
    fixed={**GPT2.fixed, "multi_query": (True,), "num_key_value_heads": (1,)},
    ignored=frozenset((_GPT2_IGNORED + _BIGCODE_IGNORED).split()),
    tensors=(
        *(row for row in GPT2.tensors if ".attn." not in row.name and ".mlp." not in row.name),
        *_fused(f"{_BLOCK}/attention", "qkv", f"{_H}.attn.c_attn", "am", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/o", f"{_H}.attn.c_proj", "mh", "out_bias"),
        *_linear(f"{_BLOCK}/mlp/up", f"{_H}.mlp.c_fc", "fm", "mlp_bias"),
        *_linear(f"{_BLOCK}/mlp/down", f"{_H}.mlp.c_proj", "mf", "mlp_bias"),
    ),
)


def _same_width(values: Values, problems: list[str]) -> None:
    """OPT-350m projects its embeddings, and normalises behind its layers."""
    inner, outer = values["hidden_size"], values["word_embed_proj_dim"]
    if inner != outer:
        problems.append(f"word_embed_proj_dim = {outer!r}: only {inner!r}, the hidden size")


_D = "model.decoder.layers.{i}"
OPT = Family(
    model_type="opt",
    architectures=("OPTForCausalLM",),
    fields={
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "mlp_size": "ffn_dim",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_positions": "max_position_embeddings",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        **dict.fromkeys(_BIAS_FIELDS, "enable_bias"),
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
        "word_embed_proj_dim": 768,
    },
    fixed={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({}, None),
    },
    windows=no_windows,
    ignored=frozenset(("dropout", "activation_dropout", "layerdrop", "init_std")),
    rotary=False,
    position_offset=2,
    check=_same_width,
    tensors=(
        TensorRow("embed/embedding", "model.decoder.embed_tokens.weight", "vm"),
        TensorRow("positions/embedding", "model.decoder.embed_positions.weight", "pm"),
        *_norm(f"{_BLOCK}/attention_norm", f"{_D}.self_attn_layer_norm"),
        *_linear(f"{_BLOCK}/attention/q", f"{_D}.self_attn.q_proj", "hm", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/k", f"{_D}.self_attn.k_proj", "km", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/v", f"{_D}.self_attn.v_proj", "km", "qkv_bias"),
        *_linear(f"{_BLOCK}/attention/o", f"{_D}.self_attn.out_proj", "mh", "out_bias"),
        *_norm(f"{_BLOCK}/mlp_norm", f"{_D}.final_layer_norm"),
        *_linear(f"{_BLOCK}/mlp/up", f"{_D}.fc1", "fm", "mlp_bias"),
        *_linear(f"{_BLOCK}/mlp/down", f"{_D}.fc2", "mf", "mlp_bias"),
        *_norm("final_norm", "model.decoder.final_layer_norm"),
        _HEAD,
    ),
)

_ROWS = (LLAMA, MISTRAL, QWEN2, PHI3, STARCODER2, GPT2, GPT_BIGCODE, OPT)
FAMILIES: dict[str, Family] = {row.model_type: row for row in _ROWS}
