"""Families of Hugging Face models: the one place that knows how they differ.

A family is a row of `FAMILIES`: how its ``config.json`` becomes a `ModelConfig`, and which tensor
of its checkpoints is which of our parameters. A new family is a new row.

``config.json`` is read as it lies on disk, not through ``AutoConfig``, which accepts every key.
Each key must be *read* (`Family.defaults`), understood at *one value only* (`Family.fixed`), or
known not to change the forward pass (`IGNORED`); any other key is an error, since it may be the
one that makes the model another model. What is missing takes the default of the family's config
class in transformers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lordjax.conversions.rope import ROPE_KEYS, read_rope
from lordjax.models.config import ModelConfig
from lordjax.models.layers import ACTIVATIONS

Values = Mapping[str, Any]  # the keys of a config.json that a family reads, defaults filled in


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Where a parameter lies in a Hugging Face checkpoint.

    Attributes:
      name: the tensor's name there.
      shape: its shape there.
      transpose: whether it is ``[out, in]`` there; ours are ``[in, out]``.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """Our parameter from their tensor, contiguous."""
        return np.ascontiguousarray(tensor.T) if self.transpose else tensor


class TensorRow(NamedTuple):
    """A line of a family's tensor table; ``{i}`` stands for the number of the block."""

    path: str  # ours
    name: str  # theirs
    dims: str  # their shape, in letters of `_sizes`
    transpose: bool = False
    when: str | None = None  # field of `ModelConfig` that must be true; "not x": false


@dataclasses.dataclass(frozen=True)
class Family:
    """One row: a ``model_type`` of Hugging Face.

    Attributes:
      model_type: the key ``model_type`` of its ``config.json``.
      architectures: accepted values of the key ``architectures``.
      fields: field of `ModelConfig` -> key that holds it.
      constants: fields of `ModelConfig` that are the same in the whole family.
      defaults: keys that are read -> default of the family's config class.
      fixed: keys understood at these values only.
      windows: per-layer sliding windows from the values and a list that takes problems.
      tensors: the tensor table.
      ignored_tensors: patterns of tensors that carry nothing.
    """

    model_type: str
    architectures: tuple[str, ...]
    fields: Mapping[str, str]
    constants: Mapping[str, Any]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    windows: Callable[[Values, list[str]], tuple[int | None, ...] | None]
    tensors: tuple[TensorRow, ...]
    ignored_tensors: tuple[str, ...]

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may be left over."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored_tensors)


# Keys that do not change the forward pass: bookkeeping, token ids, training and generation.
_BOOKKEEPING = """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path
    _commit_hash _attn_implementation attn_implementation _attn_implementation_autoset
    tokenizer_class bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    decoder_start_token_id use_cache output_attentions output_hidden_states return_dict
    return_dict_in_generate output_scores torchscript use_bfloat16 tf_legacy_loss
    initializer_range attention_dropout pretraining_tp chunk_size_feed_forward
    tie_encoder_decoder cross_attention_hidden_size is_decoder problem_type id2label label2id
    num_labels finetuning_task task_specific_params prefix max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    is_llama_config transformers.js_config max_sequence_length unsloth_fixed unsloth_version
"""
IGNORED = frozenset(_BOOKKEEPING.split())

# Keys whose null has a meaning: derive it from the other sizes, or no sliding window.
_NULLABLE = frozenset(("num_key_value_heads", "head_dim", "sliding_window", "layer_types"))


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
    values = _read_keys(family, hf_config, problems)
    rope = read_rope(hf_config, values, problems)
    windows = family.windows(values, problems)
    fields = dict(family.constants) | {f: values[key] for f, key in family.fields.items()}
    _fill_and_check_sizes(fields, problems)
    if problems:
        raise ValueError(
            f"{where}: {len(problems)} thing(s) in it are not understood, so the converted model "
            f"would be another one (family {family.model_type}):\n  " + "\n  ".join(problems)
        )
    return ModelConfig(**fields, rope=rope, windows=windows)


def tensor_table(hf_config: Values, where: str = "config.json") -> dict[str, TensorSource]:
    """Our parameter path -> the tensor of a checkpoint with this ``config.json``."""
    family, config = family_of(hf_config, where), model_config(hf_config, where)
    sizes = _sizes(config)
    table = {}
    for row in family.tensors:
        if row.when and getattr(config, row.when.removeprefix("not ")) == ("not " in row.when):
            continue
        shape = tuple(sizes[letter] for letter in row.dims)
        for i in range(config.num_layers if "{i}" in row.path else 1):
            path, name = row.path.format(i=i), row.name.format(i=i)
            table[path] = TensorSource(name, shape, row.transpose)
    return table


def _sizes(config: ModelConfig) -> dict[str, int]:
    """The letters of `TensorRow.dims`."""
    return {
        "v": config.vocab_size,
        "m": config.hidden_size,
        "f": config.mlp_size,
        "h": config.num_heads * config.head_size,
        "k": config.num_kv_heads * config.head_size,
    }


def _read_keys(family: Family, hf_config: Values, problems: list[str]) -> dict[str, Any]:
    """Values of the keys that the family reads; a value of the wrong type becomes the default."""
    for key, value in hf_config.items():
        accepted = family.fixed.get(key)
        if accepted is not None and value not in accepted:
            problems.append(f"{key} = {value!r}: only {accepted[0]!r} is supported")
        elif key == "quantization_config":
            problems.append(f"{key}: the checkpoint is quantised; convert the original instead")
        elif accepted is None and key not in family.defaults and key not in IGNORED | ROPE_KEYS:
            problems.append(f"{key} = {value!r}: unknown key")
    values = dict(family.defaults)
    for key, default in family.defaults.items():
        value = hf_config.get(key, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) in kinds or default is None or (value is None and key in _NULLABLE):
            values[key] = value
        else:
            problems.append(f"{key} = {value!r}: expected a {type(default).__name__}")
    if values["hidden_act"] not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        problems.append(f"hidden_act = {values['hidden_act']!r}: supported: {known}")
    return values


def _fill_and_check_sizes(fields: dict[str, Any], problems: list[str]) -> None:
    """Derives the head sizes that are left to derive, and checks that all sizes fit."""
    optional = ("num_kv_heads", "head_size")
    sizes = ("vocab_size", "hidden_size", "mlp_size", "num_layers", "num_heads", "max_positions")
    bad = [f for f in sizes if not _is_size(fields[f])]
    bad += [f for f in optional if fields[f] is not None and not _is_size(fields[f])]
    problems += [f"{f} = {fields[f]!r}: expected a positive integer" for f in bad]
    if bad:
        return
    if fields["num_kv_heads"] is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["head_size"] is None:
        fields["head_size"] = fields["hidden_size"] // fields["num_heads"]
        if fields["hidden_size"] % fields["num_heads"]:
            problems.append("hidden_size is no multiple of the number of heads, and no head_dim")
    if fields["num_heads"] % fields["num_kv_heads"]:
        problems.append(
            f"{fields['num_heads']} query heads are no multiple of "
            f"{fields['num_kv_heads']} key/value heads"
        )
    if fields["head_size"] % 2:
        problems.append(f"head size {fields['head_size']}: rotary positions need an even one")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _no_windows(values: Values, problems: list[str]) -> None:
    del values, problems


def _one_window(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """The same sliding window in every layer."""
    window = values["sliding_window"]
    if window is None:
        return None
    if not _is_size(window):
        problems.append(f"sliding_window = {window!r}: expected a positive integer or null")
        return None
    return (window,) * values["num_hidden_layers"]


def _mixed_windows(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """A window in the layers that ``layer_types`` names, else from ``max_window_layers`` on."""
    if not values["use_sliding_window"]:
        return None
    window = _one_window(values, problems)
    if window is None:
        return None
    first, count = values["max_window_layers"], values["num_hidden_layers"]
    full, sliding = "full_attention", "sliding_attention"
    kinds = values["layer_types"] or [sliding if i >= first else full for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - {full, sliding}:
        problems.append(f"layer_types = {kinds}: expected {count} times {full} or {sliding}")
        return None
    return tuple(w if kind == sliding else None for w, kind in zip(window, kinds, strict=True))


def _linear(path: str, name: str, dims: str, bias: str) -> tuple[TensorRow, TensorRow]:
    """The two rows of an ``nn.Linear``, of which the second holds where the model has biases."""
    return (
        TensorRow(f"{path}/kernel", f"{name}.weight", dims, transpose=True),
        TensorRow(f"{path}/bias", f"{name}.bias", dims[0], when=bias),
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
    windows=_no_windows,
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
    windows=_one_window,
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
    windows=_mixed_windows,
)

FAMILIES: dict[str, Family] = {row.model_type: row for row in (LLAMA, MISTRAL, QWEN2)}
