"""Defines a family of Hugging Face models (`Family`), and helpers that write its tensor table."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lordjax.conversions.families.rope import read_rope
from lordjax.models.config import ModelConfig, Rope

Values = Mapping[str, Any]  # keys of config.json that a family reads, with defaults


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensor of a Hugging Face checkpoint that holds a lordjax parameter.

    Attributes:
      name: name of the tensor.
      shape: shape of the tensor.
      transpose: whether the tensor is ``[out, in]``; lordjax kernels are ``[in, out]``.
      columns: outputs of the tensor that the parameter takes, in its order; None takes all.
      offset: number that is added to the tensor on loading, in float32 to keep small values.
    """

    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    columns: slice | np.ndarray | None = None
    offset: float = 0.0

    def load(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the parameter that the tensor holds, as a contiguous array."""
        tensor = tensor.T if self.transpose else tensor
        tensor = tensor if self.columns is None else tensor[..., self.columns]
        if self.offset:
            tensor = tensor.astype(np.float32) + np.float32(self.offset)
        return np.ascontiguousarray(tensor)

    def loaded_dtype(self, stored: np.dtype) -> np.dtype:
        """Returns the dtype of the parameter if the tensor has the dtype ``stored``."""
        return np.dtype(np.float32) if self.offset else stored

    def store(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the parameter into the tensor, in place; the inverse of `load`."""
        tensor = tensor.T if self.transpose else tensor
        if self.offset:
            parameter = parameter.astype(np.float32) - np.float32(self.offset)
        tensor[..., slice(None) if self.columns is None else self.columns] = parameter

    @property
    def loaded_shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        shape = self.shape[::-1] if self.transpose else self.shape
        return shape if self.columns is None else (*shape[:-1], len(self.places))

    @property
    def places(self) -> np.ndarray:
        """Indices of the tensor's outputs that the parameter takes."""
        every = np.arange(self.shape[0 if self.transpose else -1])
        return every if self.columns is None else every[self.columns]


class TensorRow(NamedTuple):
    """A row of a family's tensor table; ``{i}`` stands for the number of the block."""

    path: str  # path of the lordjax parameter
    name: str  # name of the Hugging Face tensor
    dims: str  # shape of the tensor, in letters of `sizes_of`
    transpose: bool = False  # as in `TensorSource`
    when: str | None = None  # `ModelConfig` field that must be true; "not x" must be false
    columns: Callable[[ModelConfig], slice | np.ndarray] | None = None  # outputs in a fused tensor
    offset: float = 0.0  # as in `TensorSource`


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: one ``model_type`` of Hugging Face.

    Attributes:
      model_type: value of the key ``model_type`` in ``config.json``.
      architectures: supported values of the key ``architectures``.
      fields: dict from a field of `ModelConfig` to the config key that holds it.
      constants: fields of `ModelConfig` that are equal for all models of the family.
      defaults: dict from every key that is read to the default of the family's config class.
      fixed: dict from keys to the only supported values.
      windows: function of the values and a list of problems; see `families.sliding_windows`.
      tensors: tensor table without the rows of the heads.
      ignored_tensors: regular expressions for tensors that the model does not need.
      ignored: keys that do not change the forward pass; see `families.config.keys`.
      rope: function of the config, the values and a list of problems that returns the `Rope`.
      rope_keys: keys that ``rope`` reads from the config in addition to the values.
      position_offset: row of the first learned position; None if ``derive`` sets it, or if
        positions are not learned.
      prefix: prefix of all tensor names except the head's; the bare model's checkpoints omit it.
      derive: function with the arguments of ``rope`` that returns computed fields of `ModelConfig`.
      heads: dict from a value of `ModelConfig.head` to additional rows of the tensor table.
      carried: rows that the forward pass does not read, of tensors that a checkpoint may have.
      copies: dict from a tensor that repeats another one in tied models to that one's path.
      old_names: dict from a part of a tensor name to its spelling in old checkpoints.
      module_names: dict from a tensor to its different name in the class of transformers.
    """

    model_type: str
    architectures: tuple[str, ...]
    fields: Mapping[str, str]
    constants: Mapping[str, Any]
    defaults: Mapping[str, Any]
    windows: Callable[[Values, list[str]], tuple[int | None, ...] | None]
    tensors: tuple[TensorRow, ...]
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    ignored_tensors: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    rope: Callable[[Values, Values, list[str]], Rope | None] = read_rope
    rope_keys: frozenset[str] = frozenset()
    position_offset: int | None = None
    prefix: str = "model."
    derive: Callable[[Values, Values, list[str]], Mapping[str, Any]] | None = None
    heads: Mapping[str, tuple[TensorRow, ...]] = dataclasses.field(
        default_factory=lambda: decoder_heads()
    )
    carried: tuple[TensorRow, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"lm_head.weight": "embed/embedding"}
    )
    old_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    module_names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ignores(self, name: str) -> bool:
        """Returns whether the model does not need a tensor of this name."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored_tensors)


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Returns the size that each letter of `TensorRow.dims` stands for."""
    queries, keys = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    return {
        "v": config.vocab_size,
        "m": config.hidden_size,
        "f": config.mlp_size,
        "h": queries,
        "k": keys,
        "a": queries + 2 * keys,  # fused queries, keys and values
        "g": 2 * config.mlp_size,  # fused gate and up
        "p": config.position_rows or 0,
        "d": config.head_size,
        "t": config.token_types,
        "c": config.num_classes or 0,
        "2": 2,
        "w": config.embed_size or config.hidden_size,  # width of the token embedding
    }


def is_positive_int(value: Any) -> bool:
    """Returns whether a config value is an integer above 0."""
    return type(value) is int and value > 0


BLOCK = "layer_{i}"
BIAS_FIELDS = ("qkv_bias", "out_bias", "mlp_bias")
HEAD = TensorRow("head/kernel", "lm_head.weight", "vm", True, when="not tie_embeddings")


def linear(
    path: str, name: str, dims: str, bias: str, *, conv1d: bool = False
) -> tuple[TensorRow, TensorRow]:
    """Returns the rows of a linear layer: kernel and bias.

    Args:
      path: path of the lordjax layer.
      name: name of the Hugging Face layer.
      dims: shape of the weight, in letters of `sizes_of`.
      bias: field of `ModelConfig` that says whether the layer has a bias.
      conv1d: whether the weight is ``[in, out]`` (GPT-2's ``Conv1D``), not ``[out, in]``.
    """
    out = dims[1] if conv1d else dims[0]
    return (
        TensorRow(f"{path}/kernel", f"{name}.weight", dims, transpose=not conv1d),
        TensorRow(f"{path}/bias", f"{name}.bias", out, when=bias),
    )


def decoder_heads(
    causal: Iterable[TensorRow] = (HEAD,), tokens: str = "score"
) -> dict[str, tuple[TensorRow, ...]]:
    """Returns the rows of a decoder's heads.

    Args:
      causal: rows of the head that predicts the next token.
      tokens: name of the layer that classifies tokens.
    """
    return {
        "causal": tuple(causal),
        "classes": (TensorRow("head/kernel", "score.weight", "cm", True),),
        "tokens": linear("head", tokens, "cm", "head_bias"),
    }


# Layer inside a fused layer -> its number of outputs, a letter of `sizes_of`.
_FUSED_COLUMNS = {"q": "h", "k": "k", "v": "k", "gate": "f", "up": "f"}


def fused(path: str, layers: Iterable[str], name: str, dims: str, bias: str) -> Iterator[TensorRow]:
    """Yields the rows of layers that are stored as one, with concatenated outputs.

    Args:
      path: path above the lordjax layers.
      layers: names of the lordjax layers, in stored order.
      name: name of the fused Hugging Face layer.
      dims: shape of the fused weight; ``m``, the input size, comes first in GPT-2's ``Conv1D``.
      bias: field of `ModelConfig` that says whether the layers have biases.
    """
    before = ""
    for layer in layers:
        columns = functools.partial(_span, before, _FUSED_COLUMNS[layer])
        for row in linear(f"{path}/{layer}", name, dims, bias, conv1d=dims[0] == "m"):
            yield row._replace(columns=columns)
        before += _FUSED_COLUMNS[layer]


def _span(before: str, own: str, config: ModelConfig) -> slice:
    """Returns the range of ``own`` outputs after ``before`` others, in letters of `sizes_of`."""
    first, count = (
        sum(sizes_of(config)[letter] for letter in letters) for letters in (before, own)
    )
    return slice(first, first + count)


def norm(path: str, name: str) -> tuple[TensorRow, TensorRow]:
    """Returns the rows of a norm with a bias."""
    return (
        TensorRow(f"{path}/scale", f"{name}.weight", "m"),
        TensorRow(f"{path}/bias", f"{name}.bias", "m"),
    )


def head_norms(attention: str) -> Iterator[TensorRow]:
    """Yields the rows of the per-head norms of queries and keys.

    Args:
      attention: name of the Hugging Face attention layer.
    """
    for name in "qk":
        path = f"{BLOCK}/attention/{name}_norm/scale"
        yield TensorRow(path, f"{attention}.{name}_norm.weight", "d")
