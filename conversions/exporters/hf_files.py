"""Functions that several exports share: safetensors shards, ``config.json``, a family's tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from lordjax.conversions.families.family import TensorSource
from lordjax.conversions.families.registry import family_of, tensor_table
from lordjax.kernels import trees
from lordjax.kernels.base import is_kernel, materialize
from lordjax.models.config import ModelConfig
from lordjax.models.head_axes import ROPE_INDEX
from lordjax.models.tables import table_paths
from lordjax.names import layer
from lordjax.storage.checkpoint import INDEX, SHARD_BYTES
from lordjax.storage.tensor_files import write_json


class Opened(Protocol):
    """A `Source` with the config of its original model: a `saved_model.Saved` or a `Checkpoint`."""

    @property
    def config(self) -> ModelConfig:
        """Architecture of the model."""
        ...

    @property
    def hf_config(self) -> dict[str, Any]:
        """Content of the original ``config.json``."""
        ...

    def block(self, i: int) -> dict[str, Any]:
        """Returns the parameters of ``layer_i`` as a nested dict."""
        ...

    def non_block_params(self) -> dict[str, Any]:
        """Returns the parameters outside the blocks as a nested dict."""
        ...

    def leaves(self) -> dict[str, Any]:
        """Returns a ``ShapeDtypeStruct``, or a kernel of them, for every parameter path."""
        ...


@dataclasses.dataclass(frozen=True)
class ExportSpec:
    """A model to export and how to write it.

    Attributes:
      source: model to export.
      dtype: dtype in ``config.json``, and of the tensors of an export of dense matrices.
      out: final path of the export; until it is complete it has another name.
      shard_bytes: largest number of tensor bytes per file.
      write_tokenizer: function that writes tokenizer files into a directory; None: there are none.
      gguf_type: type of the matrices of a ``gguf`` export; None: that of ``dtype``.
    """

    source: Opened
    dtype: np.dtype
    out: Path
    shard_bytes: int = SHARD_BYTES
    write_tokenizer: Callable[[Path], Any] | None = None
    gguf_type: str | None = None


def check_plain(source: Opened, to: str, table: Mapping[str, TensorSource]) -> None:
    """Checks that a model has exactly the parameters that its config says, in its blocks dense.

    Args:
      source: the model.
      to: kind of export, for messages.
      table: parameter path -> tensor, such as `own_table`.

    Raises:
      ValueError: if a parameter is a low-rank pair or quantized, has another shape, or is one that
        the family's models do not have; names an export that can hold it.
    """
    leaves = source.leaves()
    tables = table_paths(source.config)  # are decoded
    kernels = [p for p, leaf in leaves.items() if is_kernel(leaf) and p not in tables]
    added = sorted(leaves.keys() - table.keys())
    other = [p for p in table.keys() & leaves.keys() if leaves[p].shape != table[p].loaded_shape]
    family = family_of(source.hf_config).model_type
    what = (
        ("low-rank pairs or quantized matrices", kernels),
        ("narrower layers or parts of heads", [p for p in added if p.endswith(ROPE_INDEX)]),
        (f"parameters that {family} models do not have", added),
        ("narrower layers or parts of heads", sorted(other)),
    )
    for name, paths in what:
        if paths:
            raise ValueError(
                f"a {to} export cannot hold {name} ({len(paths)} of them, the first is "
                f"{paths[0]}); export with --to factored, or compress with --shape stock"
            )


def outside_blocks(source: Opened) -> dict[str, Any]:
    """Returns the parameters outside the blocks by path, embeddings and head decoded."""
    return materialize(trees.flatten(source.non_block_params()))


def mlp_widths(source: Opened) -> tuple[int, ...]:
    """Returns the width of the MLP of every block."""
    leaves = source.leaves()
    return tuple(
        leaves[f"{layer(i)}/mlp/down/kernel"].shape[0] for i in range(source.config.num_layers)
    )


def table_of_width(hf_config: Mapping[str, Any], width: int) -> dict[str, TensorSource]:
    """Returns the tensor table of the model with MLPs of this width."""
    return tensor_table({**hf_config, family_of(hf_config).fields["mlp_size"]: width})


def own_table(source: Opened) -> dict[str, TensorSource]:
    """Returns the tensor of every parameter path, where every block has an MLP width of its own."""
    hf_config = source.hf_config
    table = tensor_table(hf_config, leaves=source.leaves())
    widths = mlp_widths(source)
    tables = {width: table_of_width(hf_config, width) for width in set(widths)}
    of_block_i = {f"{layer(i)}/": tables[width] for i, width in enumerate(widths)}
    return table | {
        path: own[path]
        for start, own in of_block_i.items()
        for path in table
        if path.startswith(start)
    }


def of_block(flat: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Returns the entries of ``layer_i``, by their path inside the block."""
    prefix = f"{layer(i)}/"
    return {p.removeprefix(prefix): leaf for p, leaf in flat.items() if p.startswith(prefix)}


def outside(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries outside the blocks, by path."""
    return {path: leaf for path, leaf in flat.items() if not path.startswith("layer_")}


def stored(
    table: Mapping[str, TensorSource], flat: Mapping[str, Any], dtype: np.dtype | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the names and values of the tensors of a table; a missing bias becomes 0.

    Args:
      table: dict from parameter paths to Hugging Face tensors.
      flat: parameters by path, arrays only.
      dtype: dtype of the tensors; None takes the widest dtype of a tensor's parameters.

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
                with np.errstate(over="ignore"):  # `finite` reports overflows
                    table[path].store(np.asarray(flat[path]), tensor)
        yield name, finite(tensor, name)


def finite(tensor: np.ndarray, name: str) -> np.ndarray:
    """Returns the tensor; raises ValueError if one of its values is not finite."""
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} is not finite in {tensor.dtype}; choose a wider dtype")
    return tensor


def write_shards(stage: Path, tensors: Iterable[tuple[str, np.ndarray]], limit: int) -> None:
    """Writes safetensors with the file names of transformers: one file, or shards and an index.

    Args:
      stage: directory to write into.
      tensors: names and values; only one shard is in memory at a time.
      limit: largest number of bytes per file; a larger tensor gets a file of its own.

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


# Keys that `write_config` drops: the old name of dtype, and the original's own code.
_REPLACED = ("torch_dtype", "auto_map")


def write_config(stage: Path, hf_config: Mapping[str, Any], dtype: np.dtype, **more: Any) -> None:
    """Writes ``config.json``.

    Args:
      stage: directory to write into.
      hf_config: original config.
      dtype: dtype of the model.
      **more: keys to set in addition.
    """
    kept = {key: value for key, value in hf_config.items() if key not in _REPLACED}
    write_json(stage / "config.json", {**kept, "dtype": str(dtype), **more})


def flat_block(source: Opened, i: int) -> dict[str, Any]:
    """Returns the parameters of ``layer_i`` by path."""
    return trees.flatten(source.block(i))
