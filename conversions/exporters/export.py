"""Exports a model into a directory that other programs can open.

============  ======================================================================================
dense         dense matrices in their original shapes, for stock transformers
factored      low-rank factors, pruned layers, quantized weights, with the torch code that runs them
vllm          as ``factored``, with the stock class and a quantization config, for vLLM's plugin
peft          as ``factored``, with the low-rank terms as a PEFT adapter in ``adapter/``
nemotron-nas  dense matrices with an MLP width for each block, for vLLM, TensorRT-LLM and SGLang
gguf          ``model.gguf`` for llama.cpp with its tokenizer, of models with dense matrices
orbax         parameters as nested dicts of arrays in ``params/``, and ``manifest.json``
============  ======================================================================================

Every export has a model card, ``README.md``. Nothing is sent anywhere. Exporting does not need
torch; `verify` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lordjax import names
from lordjax.conversions.exporters.dense import dense
from lordjax.conversions.exporters.factored import (
    architecture_of,
    auto_class,
    factored,
    peft,
    vllm,
)
from lordjax.conversions.exporters.gguf_file import gguf
from lordjax.conversions.exporters.hf_files import ExportSpec, Opened
from lordjax.conversions.exporters.model_card import write_card
from lordjax.conversions.exporters.nemotron_nas import nemotron_nas
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
    "nemotron-nas": nemotron_nas,
    "vllm": vllm,
    "gguf": gguf,
    "orbax": orbax,
}
SELF_CONTAINED = ("gguf",)  # exports with the tokenizer inside


def export(
    source: Opened,
    out: str | os.PathLike[str],
    to: str,
    *,
    dtype: Any = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    gguf_type: str | None = None,
) -> Path:
    """Exports a model into a directory that another program can open.

    Args:
      source: model from `saved_model.open_saved` or `open_checkpoint`.
      out: output directory; must not exist or be empty.
      to: kind of export, a key of `EXPORTS`.
      dtype: dtype of the tensors of a ``dense`` or ``nemotron-nas`` export, and of the matrices of
        a ``gguf`` export; None means the dtype of the embedding. The other kinds keep the stored
        dtypes.
      write_tokenizer: function that writes tokenizer files into a given directory; None writes
        none.
      shard_bytes: largest number of tensor bytes per file.
      gguf_type: type of the matrices of a ``gguf`` export: F32, F16, BF16 or Q8_0; None: that of
        ``dtype``.

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
    out = check_destination(out)
    job = ExportSpec(source, dtype, out, shard_bytes, write_tokenizer, gguf_type)
    size = sum(np.prod(row.shape) for row in tensor_table(source.hf_config, leaves=leaves).values())
    need = int(size) * dtype.itemsize if to == "dense" else nbytes(leaves)
    check_room(job.out, need)
    with staged(job.out, need) as stage:
        EXPORTS[to](job, stage)
        write_card(stage, source, to, auto_class(architecture_of(source.hf_config)))
        if write_tokenizer is not None and to not in SELF_CONTAINED:
            write_tokenizer(stage)
    return job.out


def check_source(source: Opened) -> None:
    """Raises ValueError if a model differs from what its original ``config.json`` describes."""
    if model_config(source.hf_config) != source.config:
        raise ValueError(
            "the config.json that this model was saved with describes another model; save the "
            "model again with the hf_config of its original model"
        )
