"""Configuration of a model: the fields by which families differ.

All fields are plain numbers, strings and tuples. So a config is hashable, as a static argument of
``jax.jit`` has to be, and can be written to JSON and read back.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base, and how the frequencies are scaled.

    Fields are named like Hugging Face's ``rope_parameters``. Fields that a scaling kind does not
    use stay at their defaults.
    """

    theta: float = 10_000.0  # base of the geometric series of frequencies
    kind: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope | none
    factor: float = 1.0  # context length divided by the length of training
    original_max_positions: int | None = None  # length of training, before scaling
    low_freq_factor: float = 1.0  # llama3: below this many turns, scale fully
    high_freq_factor: float = 4.0  # llama3: above this many turns, do not scale
    beta_fast: float = 32.0  # yarn: turns above which a frequency is kept
    beta_slow: float = 1.0  # yarn: turns below which a frequency is scaled
    attention_factor: float | None = None  # yarn, longrope: scale of cos, sin; None: computed
    mscale: float | None = None  # yarn: DeepSeek's variant of the attention factor
    mscale_all_dim: float | None = None  # yarn: divisor of that variant
    truncate: bool = True  # yarn: round the ends of the ramp to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope: divisor per pair up to the original length
    long_factor: tuple[float, ...] = ()  # longrope: divisor per pair beyond it
    size: int | None = None  # rotated columns of a head, in its first pairs; None: all


UNLIMITED = 2**31 - 1  # sliding window that hides nothing, of layers that have `local_rope` only

# Largest accepted sizes, far above those of any model: a damaged config must not fill the memory.
LARGEST = {
    "num_layers": 10_000,
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "mlp_size": 2**24,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_size": 2**16,
    "max_positions": 2**31 - 1,
    "token_types": 2**20,
    "num_classes": 2**24,
    "embed_size": 2**20,
}


def size_problem(field: str, value: Any) -> str | None:
    """Returns what is wrong with a size of a model, or None.

    Args:
      field: field of `ModelConfig`, a key of `LARGEST`.
      value: its value.
    """
    if type(value) is not int or value < 1:
        return "expected a positive integer"
    if value > LARGEST[field]:
        return f"expected at most {LARGEST[field]:,}; is the file damaged?"
    return None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a model; `conversions.families` makes one from each family's own config.

    The sizes are those of the original model. Sizes that compression may change (head width, MLP
    width, ranks) are read from the parameters when the model runs.
    """

    vocab_size: int
    hidden_size: int  # width of the residual stream
    mlp_size: int  # width of the MLP
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; num_heads is a multiple
    head_size: int  # width of one head
    max_positions: int  # longest sequence of the model, in tokens
    block: str = "sequential"  # a key of models.blocks.BLOCKS
    norm: str = "rms"  # a key of models.layers.NORMS
    norm_eps: float = 1e-6
    activation: str = "silu"  # a key of models.layers.ACTIVATIONS
    gated: bool = True  # MLP: down(act(gate) * up); else down(act(up))
    rope: Rope | None = Rope()  # None: no rotary positions
    position_rows: int | None = None  # rows of the table of learned positions; None: no table
    position_offset: int = 0  # row of the first position in that table
    causal: bool = True  # a token sees itself and earlier tokens; False: all tokens
    final_norm: bool = True  # whether a norm follows the last block
    embed_size: int | None = None  # columns of the embedding, if not hidden_size
    embed_norm: bool = False  # whether a norm precedes the first block
    token_types: int = 0  # rows of the table of token types; 0: no table
    head: str = "causal"  # causal | masked (language models) | classes (of a sequence) |
    # tokens (a class per token) | span (start and end of an answer) | none (residual stream)
    head_activation: str = "gelu"  # head "masked": a key of ACTIVATIONS
    num_classes: int | None = None  # heads "classes", "tokens", "span": outputs of the head
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False  # the head is the transposed embedding
    head_bias: bool = False  # whether the head's last layer has a bias
    windows: tuple[int | None, ...] | None = None  # sliding window per layer; None: none
    qk_norm: bool = False  # RMS norm of each head of queries and keys, before rope
    embedding_scale: float = 1.0  # factor on the token embeddings
    attention_scale: float | None = None  # factor on q @ k; None: 1/sqrt(head_size)
    attention_softcap: float | None = None  # c: attention logits x become c·tanh(x/c)
    final_softcap: float | None = None  # the same for the model's logits
    local_rope: Rope | None = None  # rope of layers with a sliding window; None: `rope`
    pooler_activation: str = "tanh"  # head "classes" of an encoder: a key of ACTIVATIONS
    wide_qk_norm: bool = False  # qk_norm over all heads at once, not over each
    residual_scale: float = 1.0  # factor on what attention and MLP add to the residual stream
    logit_scale: float = 1.0  # factor on the model's logits

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer: positions that a token sees, itself included; None: all."""
        return None if self.windows is None else self.windows[layer]

    def to_json(self) -> dict[str, Any]:
        """Returns the config as nested dicts that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelConfig:
        """Returns the config of `to_json`'s dicts.

        Raises:
          TypeError: if a field is unknown or missing, a size is impossible, or a value has another
            type than the field or is not finite.
        """
        fields = dict(fields)
        for name in LARGEST.keys() & fields.keys():
            value = fields[name]
            if value is None or (name == "token_types" and value == 0):
                continue
            if (problem := size_problem(name, value)) is not None:
                raise TypeError(f"{name} = {value!r}: {problem}")
        for name in ("rope", "local_rope"):
            if fields.get(name) is not None:
                rope: dict[str, Any] = dict(fields[name])
                factors: dict[str, Any] = {
                    k: tuple(v) for k, v in rope.items() if isinstance(v, list)
                }
                fields[name] = Rope(**(rope | factors))
                _check_types(Rope, vars(fields[name]), f"{name}.")
        if fields.get("windows") is not None:
            fields["windows"] = tuple(fields["windows"])
        config = cls(**fields)
        _check_types(cls, vars(config), "")
        if (windows := config.windows) is not None:
            right = all(window is None or window >= 1 for window in windows)
            if len(windows) != config.num_layers or not right:
                raise TypeError("windows: expected a positive integer or null for every layer")
        return config


def _check_types(cls: type, fields: dict[str, Any], prefix: str) -> None:
    """Raises TypeError if a field has another type than the class says, or is not finite."""
    for name, kind in typing.get_type_hints(cls).items():
        if not _fits(fields[name], kind):
            raise TypeError(f"{prefix}{name} = {repr(fields[name])[:80]}: expected {_named(kind)}")


def _named(kind: Any) -> str:
    return f"a {kind.__name__}" if isinstance(kind, type) else str(kind)


def _fits(value: Any, kind: Any) -> bool:
    options = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if options:
        return any(_fits(value, option) for option in options)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind
