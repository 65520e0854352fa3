"""A PEFT adapter directory as a model: its base, with the adapter merged in as tensors are read.

The matrices of LoRA are ``W + s B A`` with the scale ``s = alpha / r``, or ``alpha / √r`` with
``use_rslora``; those of DoRA have the norms of their outputs set to learned ones. Tensors that the
adapter holds whole (``modules_to_save``, biases) replace those of the base.

Sources: LoRA, arXiv 2106.09685; rsLoRA, 2312.03732; DoRA, 2402.09353; names and settings as PEFT
writes them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.conversions.readers.tensor_files import Safetensors, TensorFiles, TorchBin
from lordjax.names import listed
from lordjax.runtime.input_files import inside, read_json, reading

CONFIG = "adapter_config.json"
_WEIGHTS = {"adapter_model.safetensors": Safetensors, "adapter_model.bin": TorchBin}
_OWN_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(\.default)?(\.weight)?"
)
_SETTINGS = {"bias": ("none", "all", "lora_only"), "peft_type": ("LORA",)}
# Settings that change the merged matrix in ways that are not known here.
_OFF = ("layer_replication", "megatron_config", "trainable_token_indices", "target_parameters")


def is_adapter(path: Path) -> bool:
    """Returns whether a directory holds a PEFT adapter and no weights of a whole model."""
    whole = [path / f"{name}{end}" for name in _OWN_WEIGHTS for end in ("", ".index.json")]
    return (path / CONFIG).is_file() and not any(file.exists() for file in whole)


def base_of(path: Path) -> str:
    """Returns the base model of an adapter: a path, or a model id of the Hugging Face hub.

    Raises:
      ValueError: if the adapter does not name one.
    """
    name = read_json(inside(path, CONFIG, path)).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{path / CONFIG}: base_model_name_or_path is {name!r}; expected the directory or hub "
            "id of the model that the adapter was trained on"
        )
    beside = path / name
    return str(beside) if beside.exists() else name


@dataclasses.dataclass
class Lora:
    """The tensors of an adapter for one layer, by the names of their parts."""

    parts: dict[str, str]
    rank: int
    alpha: float


class Merged:
    """The tensors of a base model with an adapter merged in: a `TensorFiles`.

    Args:
      base: tensors of the base model.
      path: directory of the adapter.

    Raises:
      FileNotFoundError: if the adapter has no weights.
      ValueError: if its kind or a setting is not supported, or a tensor fits none of the base.
    """

    def __init__(self, base: TensorFiles, path: Path):
        self._base, self._path = base, path
        self._base_names = frozenset(base.names())
        self._config = _checked(read_json(inside(path, CONFIG, path)), path)
        self._files = _open(path)
        self._loras: dict[str, Lora] = {}
        self._whole: dict[str, str] = {}
        unknown = [name for name in self._files.names() if not self._place(name)]
        if unknown:
            raise ValueError(
                f"{path}: {len(unknown)} tensors of the adapter fit none of the base model "
                f"{base_of(path)}: {listed(sorted(unknown))}; expected an adapter that "
                "was trained on it"
            )

    def names(self) -> Iterable[str]:  # noqa: D102
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:  # noqa: D102
        if name in self._whole:
            return self._files.shape(self._whole[name])
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:  # noqa: D102
        return self._base.dtype(name)

    def where(self, name: str) -> str:  # noqa: D102
        if name in self._whole:
            return self._files.where(self._whole[name])
        return self._base.where(name)

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor with the adapter merged in, in the dtype of the base."""
        weight = self._base.read(name)
        if name in self._whole:
            weight = self._files.read(self._whole[name]).astype(weight.dtype)
        if name not in self._loras:
            return weight
        merged = self._merged(weight.astype(np.float32), self._loras[name], name)
        return merged.astype(weight.dtype)

    def _merged(self, weight: np.ndarray, lora: Lora, name: str) -> np.ndarray:
        scale = lora.alpha / (math.sqrt(lora.rank) if self._flag("use_rslora") else lora.rank)
        embedding = "lora_embedding_A" in lora.parts
        kind = "lora_embedding_" if embedding else "lora_"
        try:
            down, up = (self._part(lora, f"{kind}{side}") for side in "AB")
            change = scale * (up @ down)
            if embedding or self._flag("fan_in_fan_out"):
                change = change.T
            new = weight + change
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self._path}: the adapter does not fit {name} {weight.shape} of the base model "
                f"{base_of(self._path)} ({error})"
            ) from error
        if "lora_magnitude_vector" not in lora.parts:
            return new
        magnitude = self._part(lora, "lora_magnitude_vector").reshape(-1)
        outputs = new.T if self._flag("fan_in_fan_out") else new  # [out, in]
        outputs = outputs * (magnitude / np.linalg.norm(outputs, axis=1))[:, None]
        return outputs.T if self._flag("fan_in_fan_out") else outputs

    def _part(self, lora: Lora, part: str) -> np.ndarray:
        return self._files.read(lora.parts[part]).astype(np.float32)

    def _flag(self, key: str) -> bool:
        return bool(self._config.get(key))

    def _place(self, name: str) -> bool:
        """Notes what a tensor of the adapter is; returns whether it fits the base."""
        inner = name.removeprefix(_PREFIX)
        match = _PART.fullmatch(inner)
        if match is None:
            for wrapper in (".modules_to_save.default", ".base_layer"):
                inner = inner.replace(wrapper, "")
            whole = self._named(inner)
            if whole is not None:
                self._whole[whole] = name
            return whole is not None
        weight = self._named(f"{match['layer']}.weight")
        if weight is None:
            return False
        own = Lora({}, *(self._number(key, match["layer"]) for key in ("r", "lora_alpha")))
        self._loras.setdefault(weight, own).parts[match["part"]] = name
        return True

    def _named(self, name: str) -> str | None:
        """Returns the base's name of a tensor; a bare model omits the prefix of the family."""
        while name not in self._base_names and "." in name:
            name = name.partition(".")[2]
        return name if name in self._base_names else None

    def _number(self, key: str, layer: str) -> Any:
        """Returns rank or alpha of a layer: its own, or that of all."""
        patterns = self._config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                return value
        return self._config[key]


def _checked(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Returns the settings of an adapter; raises ValueError if one is not supported."""
    where = path / CONFIG
    for key, known in _SETTINGS.items():
        value = str(config.get(key, known[0]))
        if value not in known:
            raise ValueError(f"{where}: {key} {value!r}; expected one of {', '.join(known)}")
    for key in _OFF:
        if config.get(key):
            raise ValueError(
                f"{where}: {key} is set, which lordjax does not merge; merge the adapter with PEFT "
                "(merge_and_unload), save the model and open that"
            )
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise ValueError(f"{where}: {key} is {config.get(key)!r}; expected a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(config.get(key) or {}, f"{where}: {key}")
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _check_patterns(patterns: Any, where: str) -> None:
    """Raises ValueError unless patterns of names of layers have a number each.

    Repeated groups are refused, because they may take forever to match.
    """
    with reading(where, "not a number per pattern of names", "correct it"):
        for pattern, value in patterns.items():
            re.compile(pattern)
            if not _is_positive(value) or re.search(r"\)[*+{]", pattern):
                raise ValueError(f"{pattern[:80]!r}: {str(value)[:80]}")


def _open(path: Path) -> TensorFiles:
    for name, reader in _WEIGHTS.items():
        if (file := inside(path, name, path)).exists():
            return reader([file])
    raise FileNotFoundError(
        f"{path}: an adapter without weights; expected one of {', '.join(_WEIGHTS)}"
    )
