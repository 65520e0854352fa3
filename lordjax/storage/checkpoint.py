"""A model, compressed or not, as a directory that describes itself.

::

    model-00001-of-0000N.safetensors …   what is no block, then a block each: tensors by "/"-path
    model.safetensors.index.json         tensor -> file
    config.json                          the original Hugging Face config, plus "lordjax": {...}
    plan.json, report.json               what was decided, what came of it
    report.html                          the same for people, if the command line wrote it
    tokenizer files                      if a writer was given

Nothing is pickled. A directory is written beside its destination and renamed when it is complete
and on disk, so that a crash leaves nothing half-written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lordjax.allocation.plan import Plan
from lordjax.kernels.base import nbytes
from lordjax.models.config import ModelConfig
from lordjax.storage import shards
from lordjax.storage.atomic_directory import check_destination, check_room, staged, sync
from lordjax.storage.shards import SHARD_BYTES, Shards, split_blocks
from lordjax.storage.store import MemoryStore
from lordjax.storage.tensor_files import write_json

FORMAT = 1  # of the directory; raised when a reader of the old one would misread the new one
INDEX = "model.safetensors.index.json"


def save(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    params: Any,
    *,
    hf_config: Mapping[str, Any],
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a model directory; see the module's docstring for its files.

    Args:
      directory: destination; must be free (see `check_destination`).
      config: the architecture.
      params: the parameters; kernels of any kind.
      hf_config: the original ``config.json``.
      plan: written as ``plan.json``.
      report: written as ``report.json``.
      write_tokenizer: called with the directory to put tokenizer files into.
      shard_bytes: most tensor bytes per file.

    Returns:
      The directory.

    Raises:
      FileExistsError: if the destination is not free.
      OSError: if there is not enough room; says how much is needed and how much there is.
    """
    directory = check_destination(directory)
    check_room(directory, nbytes(params))
    with staged(directory) as stage:
        writer, pieces = Shards(stage, MemoryStore(), shard_bytes), split_blocks(params)
        for name, part in pieces.items():
            writer[name] = part
        write_about(
            stage,
            writer.finish(list(pieces)),
            config,
            hf_config=hf_config,
            plan=plan,
            report=report,
            write_tokenizer=write_tokenizer,
        )
    return directory


def describe(config: ModelConfig, params: Any) -> dict[str, Any]:
    """What `assemble` must know besides the tensors, as JSON: kinds, static fields, the model."""
    return _about(config, shards.describe(params))


def _about(config: ModelConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    from lordjax import __version__

    own = {"format": FORMAT, "version": __version__}
    own |= {"kinds": found["kinds"], "constants": found["constants"]}
    return {**own, "model": config.to_json()}


def write_about(
    stage: Path,
    found: Mapping[str, Any],
    config: ModelConfig,
    *,
    hf_config: Mapping[str, Any],
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    write_tokenizer: Callable[[Path], Any] | None = None,
    also: Callable[[Path], Any] | None = None,
) -> None:
    """Writes what a directory holds besides tensors.

    Args:
      stage: the directory.
      found: what `Parts.finish` says.
      config: the architecture.
      hf_config: see `save`.
      plan: see `save`.
      report: see `save`.
      write_tokenizer: see `save`.
      also: called with the directory when everything else is in it, to put more into it.
    """
    lordjax = {
        **_about(config, found),
        "method": None if plan is None else plan.method,
        "calibration": (report or {}).get("calibration"),
        "settings": (report or {}).get("settings"),
    }
    total = {"total_size": found["nbytes"]}
    write_json(stage / INDEX, {"metadata": total, "weight_map": found["index"]})
    write_json(stage / "config.json", {**hf_config, "lordjax": lordjax})
    if plan is not None:
        plan.write(stage / "plan.json")
    if report is not None:
        write_json(stage / "report.json", {**report, "file_bytes": found["file_bytes"]})
    if write_tokenizer is not None:
        write_tokenizer(stage)
    if also is not None:
        also(stage)
    sync(stage)
