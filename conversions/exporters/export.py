"""Exports a model into a directory that other programs can open.

========  ==========================================================================================
dense     dense matrices in their original shapes, for stock transformers
factored  low-rank factors, pruned layers and quantized weights, with the torch code that runs them
peft      as ``factored``, with the low-rank terms as a PEFT adapter in ``adapter/``
orbax     parameters as nested dicts of arrays in ``params/``, and ``manifest.json``
========  ==========================================================================================

Exporting does not need torch; `verify` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lordjax import names
from lordjax.conversions.exporters.dense import dense
from lordjax.conversions.exporters.factored import factored, peft
from lordjax.conversions.exporters.hf_files import ExportSpec, Opened
from lordjax.conversions.exporters.orbax import orbax
from lordjax.conversions.families.registry import model_config, tensor_table
from lordjax.kernels.base import nbytes
from lordjax.storage.atomic_directory import check_destination, staged
from lordjax.storage.checkpoint import SHARD_BYTES
from lordjax.storage.room import check_room

EXPORTS: dict[str, Callable[[ExportSpec, Path], None]] = {
    "dense": dense,
    "factored": factored,
    "peft": peft,
    "orbax": orbax,
}


def export(
    source: Opened,
    out: str | os.PathLike[str],
    to: str,
    *,
    dtype: Any = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Exports a model into a directory that another program can open.

    Args:
      source: model from `saved_model.open_saved` or `open_checkpoint`.
      out: output directory; must not exist or be empty.
      to: kind of export, a key of `EXPORTS`.
      dtype: dtype of the tensors of a ``dense`` export; None means the dtype of the embedding. The
        other kinds keep the stored dtypes.
      write_tokenizer: function that writes tokenizer files into a given directory; None writes
        none.
      shard_bytes: largest number of tensor bytes per file.

    Returns:
      The output directory.

    Raises:
      KeyError: if ``to`` is no kind of export.
      FileExistsError: if the output directory is not empty.
      OSError: if the disk has not enough space.
      ValueError: if this kind of export cannot express the model, or if ``hf_config`` describes
        another model.
    """
    if to not in EXPORTS:
        raise KeyError(f"no export {to!r}; {names.did_you_mean(to, EXPORTS)}")
    check_source(source)
    leaves = source.leaves()
    dtype = np.dtype(dtype or leaves["embed/embedding"].dtype)
    job = ExportSpec(source, dtype, check_destination(out), shard_bytes)
    size = sum(np.prod(row.shape) for row in tensor_table(source.hf_config, leaves=leaves).values())
    need = int(size) * dtype.itemsize if to == "dense" else nbytes(leaves)
    check_room(job.out, need)
    with staged(job.out, need) as stage:
        EXPORTS[to](job, stage)
        if write_tokenizer is not None:
            write_tokenizer(stage)
    return job.out


def check_source(source: Opened) -> None:
    """Raises ValueError if a model differs from what its original ``config.json`` describes."""
    if model_config(source.hf_config) != source.config:
        raise ValueError(
            "the config.json that this model was saved with describes another model; save the "
            "model again with the hf_config of its original model"
        )
