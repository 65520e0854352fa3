"""What all exports write: safetensors in shards, ``config.json``, tensors of a family's table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from lordjax.conversions.families.family import TensorSource
from lordjax.kernels import trees
from lordjax.models.config import ModelConfig
from lordjax.storage.checkpoint import INDEX, SHARD_BYTES


class Opened(Protocol):
    """A `Source` that knows its original: a `checkpoint.Saved` or a `Checkpoint`."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def hf_config(self) -> dict[str, Any]:
        """The original ``config.json``."""
        ...

    def block(self, i: int) -> dict[str, Any]:
        """Nested dict of ``layer_i``."""
        ...

    def non_block_params(self) -> dict[str, Any]:
        """Nested dict of everything outside the blocks."""
        ...

    def leaves(self) -> dict[str, Any]:
        """Parameter path -> ``ShapeDtypeStruct`` or kernel of them."""
        ...


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """What is to be exported.

    Attributes:
      source: the model.
      dtype: in which the model computes, and in which matrices are multiplied out.
      shard_bytes: most tensor bytes per file.
      out: where it will be when it is complete.
    """

    source: Opened
    dtype: np.dtype
    out: Path
    shard_bytes: int = SHARD_BYTES


def of_block(flat: Mapping[str, Any], i: int) -> dict[str, Any]:
    """What belongs to ``layer_i``, by the path inside."""
    prefix = f"layer_{i}/"
    return {p.removeprefix(prefix): leaf for p, leaf in flat.items() if p.startswith(prefix)}


def outside(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What belongs to no block, by path."""
    return {path: leaf for path, leaf in flat.items() if not path.startswith("layer_")}


def stored(
    table: Mapping[str, TensorSource], flat: Mapping[str, Any], dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a table, put together from our parameters; a missing bias is 0.

    Args:
      table: ours -> theirs.
      flat: our parameters, arrays only.
      dtype: of the tensors; None: the widest of their parts'.

    Raises:
      ValueError: if a value is not finite in ``dtype``.
    """
    parts: dict[str, list[str]] = {}
    for path, source in table.items():
        parts.setdefault(source.name, []).append(path)
    for name, paths in parts.items():
        own = (np.dtype(flat[path].dtype) for path in paths if path in flat)
        kind = dtype or max(own, key=lambda kind: kind.itemsize)
        tensor = np.zeros(table[paths[0]].shape, kind)
        for path in paths:
            if path in flat or not path.endswith("/bias"):
                with np.errstate(over="ignore"):  # reported below
                    table[path].store(np.asarray(flat[path]), tensor)
        yield name, finite(tensor, name)


def finite(tensor: np.ndarray, name: str) -> np.ndarray:
    """The tensor itself; raises ValueError if it has a value that is not finite."""
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} is not finite in {tensor.dtype}; export a model of a wider dtype")
    return tensor


def write_shards(stage: Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> None:
    """Safetensors under the names of transformers: one file, or several and an index.

    Args:
      stage: the directory.
      tensors: name and values, asked for one by one.
      limit: most bytes per file (or one tensor).

    Raises:
      OSError: if a file cannot be written.
    """
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        try:
            safetensors.numpy.save_file(batch, stage / str(len(shards)), {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{stage}: cannot be written ({error}); is the disk full?") from error
        shards.append(list(batch))
        batch.clear()

    for name, array in tensors:
        if batch and sum(a.nbytes for a in batch.values()) + array.nbytes > limit:
            flush()
        batch[name] = np.asarray(array, order="C")
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (stage / "0").rename(stage / "model.safetensors")
        return
    index = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (stage / str(i)).rename(stage / file)
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_json(stage / INDEX, content)


def write_json(file: Path, value: Any) -> None:
    """A JSON file."""
    file.write_text(json.dumps(value, indent=1) + "\n")


# Older spelling of `dtype`; code that came with the original.
_REPLACED = ("torch_dtype", "auto_map")


def write_config(stage: Path, hf_config: Mapping[str, Any], dtype: np.dtype, **more: Any) -> None:
    """``config.json`` of what is stored."""
    kept = {key: value for key, value in hf_config.items() if key not in _REPLACED}
    write_json(stage / "config.json", {**kept, "dtype": str(dtype), **more})


def flat_block(source: Opened, i: int) -> dict[str, Any]:
    """Parameters of ``layer_i`` by path."""
    return trees.flatten(source.block(i))
