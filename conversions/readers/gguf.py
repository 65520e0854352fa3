"""Reads GGUF, the file format of llama.cpp: config, tensors and tokenizer.

The metadata becomes the ``config.json`` that the model has on the Hugging Face hub, and tensors get
their Hugging Face names, so that `families.registry` handles both formats. Two things differ from a
Hugging Face checkpoint and are converted here:

* Rotary pairs. llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face rotates (i, i + d/2). For
  that, llama.cpp's converter reorders the rows of query and key, in the architecture "llama" only.
* Llama 3's rotary scaling. GGUF stores a table of divisors (``rope_freqs.weight``) instead of the
  parameters that the table was computed from.

Values are dequantised to float32 when they are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lordjax.conversions.readers.gguf_tokenizer import read_tokenizer
from lordjax.models.config import Rope
from lordjax.models.rope import rope_frequencies

FLOATS = ("F32", "F16", "BF16")  # GGML types that are not quantised
TYPES = (*FLOATS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")  # all have tests
ROW_BYTES = 2**13  # bytes of a joined row: the temporaries of 16 rows fit into the CPU's cache
# GGUF architecture -> Hugging Face class. Mistral's files also have the architecture "llama".
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Metadata key (after the architecture) -> key of config.json; "!" marks required keys.
_CONFIG_KEYS = {
    "block_count": "!num_hidden_layers",
    "context_length": "!max_position_embeddings",
    "embedding_length": "!hidden_size",
    "feed_forward_length": "!intermediate_size",
    "attention.head_count": "!num_attention_heads",
    "attention.layer_norm_rms_epsilon": "!rms_norm_eps",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
}
_ROPE_KEYS = frozenset(
    """rope.freq_base rope.dimension_count rope.scale_linear rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_attn_factor
    rope.scaling.yarn_ext_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    attention.value_length""".split()  # noqa: SIM905
)
_NO_EFFECT = frozenset(("rope.scaling.finetuned", "tensor_data_layout"))
# Features of other models under the same architecture name -> the value that turns them off.
_OFF = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """Returns the Hugging Face name of a GGUF tensor; unknown names are returned unchanged."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


class Gguf:
    """An open GGUF file: a `tensor_files.TensorFiles` with a config and a tokenizer.

    Attributes:
      path: path of the GGUF file.
      hf_config: equivalent ``config.json``; both transformers 4 and 5 can read it.

    Raises:
      ValueError: if the file is damaged, or its architecture, metadata or types are not supported.
    """

    def __init__(self, path: Path):
        from gguf import GGUFReader

        self.path = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ValueError(
                f"{path}: not a complete GGUF file ({error}); its {path.stat().st_size} bytes are "
                "truncated or corrupt, download it again"
            ) from error
        self._tensors = {hf_name(t.name): t for t in self._reader.tensors}
        self._factors = self._tensors.pop("rope_freqs.weight", None)
        self._architecture = str(self.meta("general.architecture"))
        self.hf_config = self._config()

    def meta(self, key: str, default: Any = None) -> Any:
        """Returns a metadata value; floats get the shortest decimal that rounds to them."""
        field = self._reader.fields.get(key)
        if field is None:
            return default
        value = field.contents()
        # 1e-5 is stored in single precision and would otherwise become 9.99999974738e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    @property
    def stored_dtype(self) -> str | None:
        """Default dtype of a model that is written from this file.

        A file with quantised weights gives bfloat16, which is precise enough for weights of few
        bits. None means that no weight is quantised; weights keep the dtype of `read`.
        """
        kinds = {tensor.tensor_type.name for tensor in self._tensors.values()}
        return "bfloat16" if kinds - set(FLOATS) else None

    def names(self) -> Iterable[str]:  # noqa: D102
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        """Returns float32, the dtype of `read` for every quantisation."""
        del name
        return np.dtype(np.float32)

    def where(self, name: str) -> str:  # noqa: D102
        return f"{self.path}: tensor {self._tensors[name].name}"

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor in float32, with rotary pairs in Hugging Face's order."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        # The file is read and not mapped: slicing a memmap calls Python, which took half of the
        # time, and mapped pages count as memory until the file is closed.
        data, at = tensor.data, int(tensor.data_offset)
        stored = np.fromfile(self.path, data.dtype, data.size, offset=at).reshape(data.shape)
        rows = _longer_rows(stored)
        values = np.asarray(dequantize(rows, tensor.tensor_type), np.float32)
        values = values.reshape(self.shape(name))
        if self._architecture != "llama" or not (which := re.search(r"self_attn\.([qk])_", name)):
            return values
        heads = self.hf_config["num_attention_heads"]
        if which[1] == "k":
            heads = self.hf_config.get("num_key_value_heads", heads)
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])  # [head, pair, first/second, in]
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def tokenizer(self) -> Any:
        """Returns the file's tokenizer as a fast tokenizer of transformers."""
        from transformers import PreTrainedTokenizerFast

        tokenizer, config = read_tokenizer(self)
        del config["tokenizer_class"]
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config)

    def tokenizer_files(self, directory: Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json`` with the chat template."""
        tokenizer, config = read_tokenizer(self)
        tokenizer.save(str(directory / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        problems = self._unsupported()
        config: dict[str, Any] = {}
        if not problems:
            config = self._sizes(problems)
            config |= self._rope(config, problems)
        if problems:
            raise ValueError(
                f"{self.path}: {len(problems)} thing(s) in it are not supported:\n  "
                + "\n  ".join(problems)
            )
        return config

    def _unsupported(self) -> list[str]:
        """Lists problems: architecture, byte order, split files, metadata keys, tensor types."""
        name, problems = self._architecture, []
        if name not in ARCHITECTURES:
            return [f"architecture {name!r}; supported: {', '.join(ARCHITECTURES)}"]
        if self._reader.byte_order != "I":
            problems.append("the byte order is not this machine's; use gguf-convert-endian")
        if (parts := self.meta("split.count", 1)) > 1:
            problems.append(f"one of {parts} split files; join them with gguf-split --merge")
        known = {*_CONFIG_KEYS, *_ROPE_KEYS, *_NO_EFFECT, *_OFF}
        for key in self._reader.fields:
            short = key.removeprefix(f"{name}.")
            if short != key and short not in known:
                problems.append(f"metadata {key} = {self.meta(key)!r}: unknown key")
            elif short in _OFF and self.meta(key) != _OFF[short]:
                problems.append(f"metadata {key} = {self.meta(key)!r}: expected {_OFF[short]!r}")
        by_type: dict[str, list[str]] = {}
        for tensor in self._reader.tensors:
            by_type.setdefault(tensor.tensor_type.name, []).append(tensor.name)
        problems += [
            f"type {kind} ({len(names)} tensors, e.g. {names[0]}); supported: {', '.join(TYPES)}"
            for kind, names in by_type.items()
            if kind not in TYPES
        ]
        return problems

    def _sizes(self, problems: list[str]) -> dict[str, Any]:
        """Returns all config keys except the rotary embedding."""
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self._architecture]],
            "model_type": self._architecture,
        }
        for short, key in _CONFIG_KEYS.items():
            value = self.meta(full := f"{self._architecture}.{short}")
            if isinstance(value, list):  # one number per layer
                if len(set(value)) != 1:
                    problems.append(f"metadata {full} = {value}: expected one value for all layers")
                value = value[0]
            if value is not None:
                config[key.removeprefix("!")] = value
            elif key.startswith("!"):
                problems.append(f"metadata {full} is missing")
        if "sliding_window" in config and self._architecture == "llama":
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        if "vocab_size" not in config and "model.embed_tokens.weight" in self._tensors:
            config["vocab_size"] = self.shape("model.embed_tokens.weight")[0]
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        if config["model_type"] == "llama":
            config["attention_bias"] = any("self_attn.q_proj.bias" in n for n in self._tensors)
            config["mlp_bias"] = any("mlp.up_proj.bias" in n for n in self._tensors)
        for name in ("bos", "eos"):
            config[f"{name}_token_id"] = self.meta(f"tokenizer.ggml.{name}_token_id")
        return config | {"dtype": "float32"}

    def _rope(self, config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
        """Returns ``rope_theta`` and ``rope_scaling``, which transformers 4 and 5 both read."""

        def get(short: str, default: Any = None) -> Any:
            return self.meta(f"{self._architecture}.{short}", default)

        if problems:
            return {}
        theta = get("rope.freq_base", 10_000.0)
        head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
        for short in ("rope.dimension_count", "attention.value_length"):
            if get(short, head) != head:
                problems.append(f"metadata {short} = {get(short)}: expected the head size, {head}")
        kind = get("rope.scaling.type", "linear" if get("rope.scale_linear") else "none")
        factor = get("rope.scaling.factor", get("rope.scale_linear", 1.0))
        scaling: dict[str, Any] | None = None
        if kind == "linear":
            scaling = {"rope_type": "linear", "factor": factor}
        elif kind == "yarn":
            scaling = self._yarn(factor, config["max_position_embeddings"], get, problems)
        elif kind != "none":
            problems.append(f"metadata rope.scaling.type = {kind!r}: supported: none, linear, yarn")
        if self._factors is not None:
            if scaling is not None:
                problems.append(f"both rope_freqs.weight and {kind} scaling: expected one of them")
            from gguf.quants import dequantize

            table = dequantize(self._factors.data, self._factors.tensor_type)
            length = get("rope.scaling.original_context_length", 8192)
            scaling = llama3_scaling(np.ravel(table), theta, head, length)
            if scaling is None:
                problems.append("rope_freqs.weight: expected a table of Llama 3's rotary scaling")
        return {"rope_theta": theta, "rope_scaling": scaling or None}

    @staticmethod
    def _yarn(factor: float, longest: int, get: Any, problems: list[str]) -> dict[str, Any]:
        ext = get("rope.scaling.yarn_ext_factor", 1.0)
        if ext not in (1.0, -1.0):  # -1 means the default, 1
            problems.append(f"metadata rope.scaling.yarn_ext_factor = {ext}: expected 1 or -1")
        # llama.cpp multiplies this scale by 1 + log(factor) / 10.
        scale = get("rope.scaling.yarn_attn_factor", get("rope.scaling.attn_factor", 1.0))
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": get(
                "rope.scaling.original_context_length", longest
            ),
            "attention_factor": scale * (1.0 + 0.1 * math.log(factor)),
            "beta_fast": get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": get("rope.scaling.yarn_beta_slow", 1.0),
        }


def _longer_rows(data: np.ndarray) -> np.ndarray:
    """Joins stored rows into rows of about `ROW_BYTES`; gguf dequantises 16 rows per call."""
    if data.ndim < 2 or not data.size:  # a vector must not be cut inside a quantisation block
        return data
    data = data.reshape(-1, data.shape[-1])
    rows, width = len(data), data.shape[1] * data.itemsize
    joined = max(n for n in range(1, max(1, ROW_BYTES // width) + 1) if rows % n == 0)
    return data.reshape(rows // joined, -1)


def llama3_scaling(
    divisors: Float[np.ndarray, " half"], theta: float, head_size: int, length: int
) -> dict[str, Any] | None:
    """Recovers the parameters of Llama 3's rotary scaling from its table of divisors.

    The published parameters are tried first, then the parameters of the ramp are fitted: the kept
    fraction of a frequency is ``(turns - low) / (high - low)``, with its number of turns over the
    original length. A common factor of length, low and high cancels, so low is set to 1.

    Args:
      divisors: divisor of every rotary frequency, ``[head_size / 2]``.
      theta: base of the rotary frequencies.
      head_size: number of columns of a head.
      length: original context length to try first, in tokens.

    Returns:
      The dict for ``rope_scaling``; an empty dict if all divisors are 1, None if no parameters fit.
    """
    factor = float(divisors.max())
    if np.allclose(divisors, 1.0):
        return {}
    freq, _ = rope_frequencies(Rope(theta), head_size, length, length)
    keep = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    tries = [(1.0, 4.0, length)]
    ramp = (keep > 1e-3) & (keep < 1 - 1e-3)
    if ramp.sum() >= 2:
        slope, offset = np.polyfit(freq[ramp] / (2 * math.pi), keep[ramp], 1)
        if offset < 0:
            tries.append((1.0, 1 - 1 / offset, round(-slope / offset)))
    for low, high, original in tries:
        rope = Rope(theta, "llama3", factor, original, low, high)
        got, _ = rope_frequencies(rope, head_size, original, original)
        if np.allclose(got * divisors, freq, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": float(high),
                "original_max_position_embeddings": original,
            }
    return None
