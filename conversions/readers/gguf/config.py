"""Turns the metadata of a GGUF file into the ``config.json`` of the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lordjax.conversions.readers.gguf.architectures.registry import ARCHITECTURES
from lordjax.conversions.readers.gguf.architectures.row import Architecture
from lordjax.conversions.readers.gguf.decode import decodable
from lordjax.conversions.readers.gguf.facts import Facts
from lordjax.conversions.readers.gguf.fused import apart
from lordjax.conversions.readers.gguf.rotary import ROPE_KEYS, rope_config
from lordjax.conversions.readers.gguf.special_tokens import special_ids_config

# Keys that every row may have: what the checks here read, what tensors say, and what only says
# how a file was made.
_KNOWN = ROPE_KEYS | frozenset(
    """vocab_size feed_forward_length attention.head_count_kv attention.key_length
    attention.value_length attention.layer_norm_epsilon attention.layer_norm_rms_epsilon
    rope.scaling.finetuned tensor_data_layout""".split()  # noqa: SIM905
)
# Beginnings of the keys of images: the text part is read without them.
_IMAGES = ("vision.", "mm.")
# Features of other models -> the value that turns them off. 0, false and empty always do.
_OFF = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
}


def architecture_of(facts: Facts) -> Architecture:
    """Returns the row of a file's architecture.

    Raises:
      ValueError: if the file holds no model, or one of another architecture.
    """
    kind = facts.metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"general.type is {kind!r}, expected 'model'; open the file of the model")
    if facts.architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {facts.architecture!r}; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[facts.architecture]


def config_json(facts: Facts, row: Architecture, ignored: Collection[str]) -> dict[str, Any]:
    """Returns the config; what is wrong is added to the problems of ``facts``.

    Args:
      facts: metadata and tensors of the file; fused tensors are taken apart.
      row: its architecture.
      ignored: metadata keys that the user has ruled out.
    """
    _check_keys(facts, row, ignored)
    _check_types(facts)
    config: dict[str, Any] = {"architectures": [row.hf_class], "model_type": row.model_type}
    config |= _sizes(facts, row)
    if facts.problems:
        return config
    head_size = _head_size(facts, row, config)
    queries = config[row.num_heads]
    keys = facts.get("attention.head_count_kv", int, queries)
    facts.tensors = apart(facts.tensors, row, queries * head_size, keys * head_size)
    _check_sizes(facts, row, config, head_size)
    if row.derive is not None:
        config |= row.derive(facts, config)
    if row.rope is not None and not facts.problems:
        config |= rope_config(facts, row, config, head_size)
    if embedding := facts.shape("token_embd.weight"):
        config["vocab_size"] = embedding[0]
    config["tie_word_embeddings"] = "output.weight" not in facts.tensors
    try:
        config |= special_ids_config(facts.metadata)
    except ValueError as error:
        facts.problems.append(str(error))
    if isinstance(license_ := facts.metadata.get("general.license"), str):
        config["license"] = license_  # a note, for the model cards of exports
    return config | {"dtype": "float32"}


def _check_keys(facts: Facts, row: Architecture, ignored: Collection[str]) -> None:
    known = _KNOWN | row.keys.keys() | row.derived
    for full, value in facts.metadata.items():
        key = full.removeprefix(f"{facts.architecture}.")
        if key == full or key in known or full in ignored or not value:
            continue
        if key.startswith(_IMAGES):
            continue
        if key in _OFF and value != _OFF[key]:
            facts.problem(full, value, f"{_OFF[key]!r}")
        elif key not in _OFF:
            advice = f"a key that is known; if the model does not depend on it: --ignore-key {full}"
            facts.problem(full, value, advice)


def _check_types(facts: Facts) -> None:
    by_kind: dict[str, list[str]] = {}
    for tensor in facts.tensors.values():
        by_kind.setdefault(tensor.kind, []).append(tensor.name)
    facts.problems += [
        f"type {kind} ({len(names)} tensors, e.g. {names[0]}); supported: {', '.join(decodable())}"
        for kind, names in by_kind.items()
        if kind not in decodable()
    ]


def _sizes(facts: Facts, row: Architecture) -> dict[str, Any]:
    """Returns what single metadata keys say."""
    config: dict[str, Any] = {}
    for key, (name, kind, required) in row.keys.items():
        full, value = f"{facts.architecture}.{key}", facts.get(key, kind)
        if value is None and required and full not in facts.metadata:
            facts.problems.append(f"metadata {full} is missing")
        elif value is not None and (value < 0 or (required and value == 0)):
            facts.problem(full, value, "a number above 0")
        elif value:  # an optional value of 0 says that there is nothing of it
            config[name] = value
    return config


def _head_size(facts: Facts, row: Architecture, config: dict[str, Any]) -> int:
    """Returns the columns of a head, and adds them to the config if it has a key for them."""
    width = config[row.hidden_size] // config[row.num_heads]
    size = facts.get("attention.key_length", int, width)
    if row.head_dim:
        config["head_dim"] = size
    elif size != width:
        facts.problem(f"{facts.architecture}.attention.key_length", size, f"{width}")
    if (values := facts.get("attention.value_length", int, size)) != size:
        facts.problem(f"{facts.architecture}.attention.value_length", values, f"{size}")
    return size


def _check_sizes(
    facts: Facts, row: Architecture, config: Mapping[str, Any], head_size: int
) -> None:
    """Compares sizes with tensors, so that a damaged number is named before tables are made."""
    hidden, heads = config[row.hidden_size], config[row.num_heads]
    keys = facts.get("attention.head_count_kv", int, heads)
    queries = heads * head_size
    wanted = {
        "token_embd.weight": ("embedding_length", 1, hidden),
        "blk.0.attn_q.weight": ("attention.head_count", 0, queries),
        "blk.0.attn_k.weight": ("attention.head_count_kv", 0, keys * head_size),
        "blk.0.attn_qkv.weight": ("attention.head_count", 0, queries + 2 * keys * head_size),
    }
    for name, (key, axis, size) in wanted.items():
        shape = facts.shape(name)
        if len(shape) == 2 and shape[axis] != size:
            full = f"{facts.architecture}.{key}"
            facts.problem(
                full,
                facts.metadata.get(full),
                f"what fits to {shape[axis]} {('rows', 'columns')[axis]} of {name}, not to {size}",
            )
    blocks = {match[1] for name in facts.tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if (count := facts.get("block_count", int, 0)) > len(blocks):
        facts.problem(
            f"{facts.architecture}.block_count", count, f"at most {len(blocks)}, as in its tensors"
        )
