"""What a row of `families.FAMILIES` is, and how one is read.

``config.json`` is read as it lies on disk, not through ``AutoConfig``, which accepts every key.
Each key must be *read* (`Family.defaults`), understood at *one value only* (`Family.fixed`), or
known not to change the forward pass (`IGNORED`, `Family.ignored`); any other key is an error, since
it may be the one that makes the model another model. What is missing takes the default of the
family's config class in transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lordjax.conversions.families.rope import read_rope
from lordjax.models.config import ModelConfig, Rope
from lordjax.models.layers import ACTIVATIONS

Values = Mapping[str, Any]  # the keys of a config.json that a family reads, defaults filled in


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """Where a parameter lies in a Hugging Face checkpoint.

    Attributes:
      name: the tensor's name there.
      shape: its shape there.
      transpose: whether it is ``[out, in]`` there; ours are ``[in, out]``.
      columns: which outputs of theirs ours are, in which order; None: all as they are.
      offset: what ours are more than theirs. The sum is float32: a small part of 1 would be lost.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    columns: slice | np.ndarray | None = None
    offset: float = 0.0

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """Our parameter from their tensor, contiguous."""
        tensor = tensor.T if self.transpose else tensor
        tensor = tensor if self.columns is None else tensor[..., self.columns]
        if self.offset:
            tensor = tensor.astype(np.float32) + np.float32(self.offset)
        return np.ascontiguousarray(tensor)

    def loaded_dtype(self, stored: np.dtype) -> np.dtype:
        """The dtype of our parameter from a tensor of that dtype."""
        return np.dtype(np.float32) if self.offset else stored

    def store(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Inverse of `load`: writes our parameter into its place in their tensor."""
        tensor = tensor.T if self.transpose else tensor
        if self.offset:
            parameter = parameter.astype(np.float32) - np.float32(self.offset)
        tensor[..., slice(None) if self.columns is None else self.columns] = parameter

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """The shape of our parameter."""
        shape = self.shape[::-1] if self.transpose else self.shape
        return shape if self.columns is None else (*shape[:-1], len(self.places))

    @property
    def places(self) -> np.ndarray:
        """The outputs of theirs that ours are, as numbers."""
        every = np.arange(self.shape[0 if self.transpose else -1])
        return every if self.columns is None else every[self.columns]


class TensorRow(NamedTuple):
    """A line of a family's tensor table; ``{i}`` stands for the number of the block."""

    path: str  # ours
    name: str  # theirs
    dims: str  # their shape, in letters of `sizes_of`
    transpose: bool = False
    when: str | None = None  # field of `ModelConfig` that must be true; "not x": false
    columns: Callable[[ModelConfig], slice | np.ndarray] | None = None  # of a fused tensor
    offset: float = 0.0  # what ours are more than theirs


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
      ignored: keys that do not change the forward pass, besides `IGNORED`.
      rope: rotary positions of a config: of it, of the values, and a list that takes problems.
      rope_keys: keys that ``rope`` reads besides the values.
      position_offset: row of the first learned position; None: positions are not learned.
      prefix: of all names but the head's, which checkpoints of the bare model leave out.
      derive: fields of `ModelConfig` that are computed; arguments as for ``rope``.
      heads: head -> its rows of the tensor table; a key that is missing has none besides `tensors`.
      copies: tensor that repeats another where the head is tied -> our path of that.
      old_names: part of a name -> what old checkpoints have there.
      module_names: tensor -> where the class of transformers has it, if that is another name.
    """

    model_type: str
    architectures: tuple[str, ...]
    fields: Mapping[str, str]
    constants: Mapping[str, Any]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    windows: Callable[[Values, list[str]], tuple[int | None, ...] | None]
    tensors: tuple[TensorRow, ...]
    ignored_tensors: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    rope: Callable[[Values, Values, list[str]], Rope | None] = read_rope
    rope_keys: frozenset[str] = frozenset()
    position_offset: int | None = None
    prefix: str = "model."
    derive: Callable[[Values, Values, list[str]], Mapping[str, Any]] | None = None
    heads: Mapping[str, tuple[TensorRow, ...]] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"lm_head.weight": "embed/embedding"}
    )
    old_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    module_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name may be left over."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored_tensors)


# End of an architecture's name -> `ModelConfig.head`; the first that fits.
HEADS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForPreTraining": "masked",
    "ForSequenceClassification": "classes",
    "Model": "none",
}


def read_head(architectures: Iterable[str], hf_config: Values, problems: list[str]) -> Values:
    """The head of the first architecture, and of how many classes; two of each is a problem."""
    found = [next(h for end, h in HEADS.items() if name.endswith(end)) for name in architectures]
    if len(set(found)) > 1:
        problems.append(f"architectures = {list(architectures)}: heads of several kinds")
    if found[0] != "classes":
        return {"head": found[0]}
    labels = hf_config.get("id2label")
    count = hf_config.get("num_labels", 2) if labels is None else len(labels)
    if not _is_size(count):
        problems.append(f"num_labels = {count!r}: expected a positive integer")
    return {"head": "classes", "num_classes": count, "tie_embeddings": False}


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
    gradient_checkpointing
"""
IGNORED = frozenset(_BOOKKEEPING.split())

# Keys whose null has a meaning: derive it from the other sizes, no sliding window, no cap.
_NULLABLE = frozenset(
    (
        *("num_key_value_heads", "head_dim", "sliding_window", "layer_types", "n_inner"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    )
)


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The letters of `TensorRow.dims`."""
    queries, keys = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    return {
        "v": config.vocab_size,
        "m": config.hidden_size,
        "f": config.mlp_size,
        "h": queries,
        "k": keys,
        "a": queries + 2 * keys,  # queries, keys and values in one
        "g": 2 * config.mlp_size,  # gate and up in one
        "p": config.position_rows or 0,
        "d": config.head_size,
        "t": config.token_types,
        "c": config.num_classes or 0,
        "w": config.embed_size or config.hidden_size,  # of a word's embedding
    }


def read_keys(family: Family, hf_config: Values, problems: list[str]) -> dict[str, Any]:
    """Values of the keys that the family reads; a value of the wrong type becomes the default."""
    known = IGNORED | family.ignored | set(family.defaults) | family.rope_keys
    for key, value in hf_config.items():
        accepted = family.fixed.get(key)
        if accepted is not None and value not in accepted:
            problems.append(f"{key} = {value!r}: only {accepted[0]!r} is supported")
        elif key == "quantization_config":
            problems.append(f"{key}: the checkpoint is quantised; convert the original instead")
        elif accepted is None and key not in known:
            problems.append(f"{key} = {value!r}: unknown key")
    values = dict(family.defaults)
    for key, default in family.defaults.items():
        value = hf_config.get(key, default)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if type(value) in kinds or default is None or (value is None and key in _NULLABLE):
            values[key] = value
        else:
            problems.append(f"{key} = {value!r}: expected a {type(default).__name__}")
    key = family.fields["activation"]
    if values[key] not in ACTIVATIONS:
        problems.append(f"{key} = {values[key]!r}: supported: {', '.join(ACTIVATIONS)}")
    return values


def fill_and_check_sizes(fields: dict[str, Any], rotary: bool, problems: list[str]) -> None:
    """Derives the head sizes that are left to derive, and checks that all sizes fit."""
    optional = ("num_kv_heads", "head_size", "mlp_size")
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions")
    bad = [f for f in sizes if not _is_size(fields[f])]
    bad += [f for f in optional if fields.get(f) is not None and not _is_size(fields[f])]
    problems += [f"{f} = {fields[f]!r}: expected a positive integer" for f in bad]
    if bad:
        return
    if fields.get("num_kv_heads") is None:
        fields["num_kv_heads"] = fields["num_heads"]
    if fields["mlp_size"] is None:  # GPT-2's habit
        fields["mlp_size"] = 4 * fields["hidden_size"]
    if fields.get("head_size") is None:
        fields["head_size"] = fields["hidden_size"] // fields["num_heads"]
        if fields["hidden_size"] % fields["num_heads"]:
            problems.append("hidden_size is no multiple of the number of heads, and no head_dim")
    if fields["num_heads"] % fields["num_kv_heads"]:
        problems.append(
            f"{fields['num_heads']} query heads are no multiple of "
            f"{fields['num_kv_heads']} key/value heads"
        )
    if rotary and fields["head_size"] % 2:
        problems.append(f"head size {fields['head_size']}: rotary positions need an even one")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def no_windows(values: Values, problems: list[str]) -> None:
    """No sliding window."""
    del values, problems


def one_window(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """The same sliding window in every layer."""
    window = values["sliding_window"]
    if window is None:
        return None
    if not _is_size(window):
        problems.append(f"sliding_window = {window!r}: expected a positive integer or null")
        return None
    return (window,) * values["num_hidden_layers"]


def mixed_windows(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """A window in the layers that ``layer_types`` names, else from ``max_window_layers`` on."""
    if not values["use_sliding_window"]:
        return None
    first, count = values["max_window_layers"], values["num_hidden_layers"]
    return _windows_of(values, [i >= first for i in range(count)], problems)


def alternating_windows(values: Values, problems: list[str]) -> tuple[int | None, ...] | None:
    """A window in the layers that ``layer_types`` names, else in all but every second or so."""
    every, count = values.get("sliding_window_pattern", 2), values["num_hidden_layers"]
    if not _is_size(every):
        problems.append(f"sliding_window_pattern = {every!r}: expected a positive integer")
        return None
    if values["sliding_window"] is None:
        problems.append("sliding_window = None: expected a positive integer")
    return _windows_of(values, [(i + 1) % every != 0 for i in range(count)], problems)


def _windows_of(
    values: Values, sliding: list[bool], problems: list[str]
) -> tuple[int | None, ...] | None:
    """The window in the layers that ``layer_types`` names, else in those of ``sliding``."""
    window = one_window(values, problems)
    if window is None:
        return None
    names, count = ("full_attention", "sliding_attention"), len(sliding)
    kinds = values["layer_types"] or [names[slides] for slides in sliding]
    if not isinstance(kinds, list) or len(kinds) != count or set(kinds) - set(names):
        problems.append(f"layer_types = {kinds}: expected {count} times {' or '.join(names)}")
        return None
    return tuple(w if kind == names[1] else None for w, kind in zip(window, kinds, strict=True))


BLOCK = "layer_{i}"
BIAS_FIELDS = ("qkv_bias", "out_bias", "mlp_bias")
HEAD = TensorRow("head/kernel", "lm_head.weight", "vm", True, when="not tie_embeddings")


def linear(
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
_FUSED_COLUMNS = {"q": "h", "k": "k", "v": "k", "gate": "f", "up": "f"}


def fused(path: str, layers: Iterable[str], name: str, dims: str, bias: str) -> Iterator[TensorRow]:
    """Rows of layers whose outputs are stored one after the other in one; ``m`` is the input."""
    before = ""
    for layer in layers:
        columns = functools.partial(_span, before, _FUSED_COLUMNS[layer])
        for row in linear(f"{path}/{layer}", name, dims, bias, conv1d=dims[0] == "m"):
            yield row._replace(columns=columns)
        before += _FUSED_COLUMNS[layer]


def _span(before: str, own: str, config: ModelConfig) -> slice:
    """Outputs behind others; both in letters of `sizes_of`."""
    first, count = (
        sum(sizes_of(config)[letter] for letter in letters) for letters in (before, own)
    )
    return slice(first, first + count)


def norm(path: str, name: str) -> tuple[TensorRow, TensorRow]:
    """A norm with a bias."""
    return (
        TensorRow(f"{path}/scale", f"{name}.weight", "m"),
        TensorRow(f"{path}/bias", f"{name}.bias", "m"),
    )


def head_norms(attention: str) -> Iterator[TensorRow]:
    """The norms over each head of the queries and keys, of an attention of theirs."""
    for name in "qk":
        path = f"{BLOCK}/attention/{name}_norm/scale"
        yield TensorRow(path, f"{attention}.{name}_norm.weight", "d")
