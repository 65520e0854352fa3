"""Names and values of config keys that say nothing about what a model computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

IGNORED_KEYS = "lordjax_ignored_keys"  # key of config.json: names that the user has ruled out

# Patterns of names, for all families. They must not fit a key that any model computes with.
HARMLESS = re.compile(
    "|".join(
        (
            # Training.
            r"\w*(dropout|drop_rate|drop_path|layerdrop|pdrop)\w*|(attn|ffn|mlp|emb)_drop",
            r"init|(init|initializer)_\w+|\w+_(init|initializer)(_\w+)?|\w*init_std",
            r"\w*loss\w*|router_\w*coeff?|gradient_\w+|\w*checkpointing\w*|seed",
            r"\w*learning_rate|optimizer\w*|weight_decay|warmup\w*|\w*train(ed|ing|er)?(_\w+)?",
            r"finetun\w+|fine_tun\w+|lora_\w+|use_lora|task(_\w+)?|problem_type|neftune\w*",
            r"unsloth\w*|deepspeed\w*|zero3\w*|pretraining_tp|tensor_parallel\w*|base_model_tp_plan",
            # Tokenisation and labels.
            r"\w*_token(_id|_ids|_index|_indices|s_ids)|(pad|bos|eos|unk|sep|cls|mask)_(id|token)",
            r"\w*tokenizer\w*|\w*special_tokens?|n_special|padding_side|prefix|chat_template\w*",
            r"id2label|label2id|_?num_labels|label_\w+|spm_\w+|language\w*|lang2id|id2lang",
            # Generation.
            r"(max|min)_length|(max|min)_new_tokens|max_sequence_length|do_sample|early_stopping",
            r"\w*num_beams|\w*beam_groups|diversity_penalty|temperature|top_[kp]|typical_p",
            r"\w+_penalty|\w*ngram_size|\w*bad_words\w*|num_return_sequences|suppress_tokens",
            r"begin_suppress_tokens|forced_\w+|remove_invalid_values|(use_)?return_dict\w*|output_scores",
            r"output_(attentions|hidden_states|past|router_logits)|use_cache|\w*kv_cache\w*",
            r"(cache_(implementation|config|dtype))|generation_\w+|sampling_\w+|keys_to_ignore\w*",
            # Bookkeeping, and how a program computes the same numbers.
            r"model_type|architectures|auto_map|\w*_name_or_path|name_or_path|(\w+_)?version|license",
            r"\w*dtype|transformers\w*|transformers\.js_config|torchscript|use_bfloat16|fp16|bf16",
            r"\w*flash_?attn\w*|\w*flash_attention\w*|\w*attn_implementation\w*|use_memory_eff\w+",
            r"\w*softmax_in_fp32|reorder_and_upcast_attn|fused?_\w+|use_fused_\w+|\w*_in_fp32",
            r"summary_\w+|pooler_(fc_size|num_\w+|size_per_head|type)|directionality|tf_legacy_loss",
            r"chunk_size_feed_forward|tie_encoder_decoder|cross_attention_hidden_size|is_decoder",
            r"(\w+_)?name|sentence_transformers|sbert_\w+|custom_pipelines?|trust_remote_code",
            r"_commit_hash|_attn\w*|_num_labels|output_projection|inference_runner|max_batch_size",
            r"validate_runner_input|pre_allocate_kv_cache|pad_key_length|is_llama_config|creat\w+_at",
            IGNORED_KEYS,
        )
    )
)


def ruled_out_keys(hf_config: Mapping[str, Any]) -> list[str]:
    """Returns the keys that the user has ruled out with ``--ignore-key``."""
    names = hf_config.get(IGNORED_KEYS) or []
    return [str(name) for name in names] if isinstance(names, list) else []


def unknown_key(key: str, value: Any, what: str = "") -> str:
    """Returns the error text of a key that is not understood.

    Args:
      key: name of the key.
      value: its value.
      what: object that the key is in, such as ``"rope type linear"``.
    """
    shown, inside = repr(value), f"{what}: " if what else ""
    shown = shown if len(shown) < 80 else f"{shown[:76]} …"
    return (
        f"{inside}{key} = {shown}: unknown key, it may change the model; if it does not, add "
        f"--ignore-key {key}"
    )


def says_nothing(value: Any) -> bool:
    """Returns whether a value switches nothing on: null, false, empty, or the count 0."""
    return value is None or value is False or value in ("", [], {}) or is_zero_count(value)


def is_zero_count(value: Any) -> bool:
    """Returns whether a value is the integer 0, which counts nothing."""
    return type(value) is int and value == 0
