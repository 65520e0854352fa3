"""Out again: a model of ours as a directory that others open.

========  ==========================================================================================
dense     every matrix multiplied out, in the original shapes: stock transformers
factored  factors, narrower layers and packed codes, and the torch code that runs them
peft      the same without the products beside codes, which become a PEFT adapter in ``adapter/``
orbax     the tree as plain nested dicts of arrays in ``params/``, and ``manifest.json``
========  ==========================================================================================

Nothing here needs torch; `verify` does.
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
from lordjax.storage.atomic_directory import check_destination, check_room, staged
from lordjax.storage.checkpoint import SHARD_BYTES

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
    """Writes a model for others.

    Args:
      source: what `checkpoint.open_saved` or `open_checkpoint` opened.
      out: destination; must be free.
      to: a key of `EXPORTS`.
      dtype: of matrices that are multiplied out; None = that of the embedding, in which the model
        computes. The other kinds store what there is.
      write_tokenizer: called with the directory to put tokenizer files into.
      shard_bytes: most tensor bytes per file.

    Returns:
      The directory.

    Raises:
      KeyError: if there is no such kind.
      FileExistsError: if the destination is not free.
      OSError: if there is not enough room.
      ValueError: if the model cannot be expressed in this kind, or belongs to another config.
    """
    if to not in EXPORTS:
        raise KeyError(f"no export {to!r}; {names.did_you_mean(to, EXPORTS)}")
    check_source(source)
    leaves = source.leaves()
    dtype = np.dtype(dtype or leaves["embed/embedding"].dtype)
    job = ExportSpec(source, dtype, check_destination(out), shard_bytes)
    size = sum(np.prod(row.shape) for row in tensor_table(source.hf_config).values())
    check_room(job.out, int(size) * dtype.itemsize if to == "dense" else nbytes(leaves))
    with staged(job.out) as stage:
        EXPORTS[to](job, stage)
        if write_tokenizer is not None:
            write_tokenizer(stage)
    return job.out


def check_source(source: Opened) -> None:
    """Raises ValueError if a model is not what its original ``config.json`` describes."""
    if model_config(source.hf_config) != source.config:
        raise ValueError(
            "the config.json that this model was saved with describes another model; save it with "
            "the hf_config of its original"
        )
