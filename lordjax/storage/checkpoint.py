"""Saves a model, compressed or not, as a directory that describes itself.

::

    model-00001-of-0000N.safetensors …   non-block parameters, then a file per block; "/"-paths
    model.safetensors.index.json         tensor -> file
    config.json                          the original Hugging Face config, plus "lordjax": {...}
    plan.json, report.json               the compression plan, and what was measured
    checksums.json                       checksums of every tensor and of the small files
    report.html                          the report as a web page, if the command line wrote it
    tokenizer files                      if a writer was given

Nothing is pickled. A directory is written beside its destination, synced to disk, and renamed when
it is complete. A crash therefore leaves no half-written model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lordjax.allocation.plan import Plan
from lordjax.kernels.base import nbytes
from lordjax.models.config import ModelConfig
from lordjax.runtime import json_files
from lordjax.storage import shards
from lordjax.storage.atomic_directory import check_destination, staged, sync
from lordjax.storage.checksums import MANIFEST, Manifest
from lordjax.storage.room import check_room
from lordjax.storage.shards import SHARD_BYTES, Shards, split_blocks
from lordjax.storage.store import MemoryStore
from lordjax.storage.tensor_files import write_json, write_text

FORMAT = 1  # version of the directory; raised when an older reader would misread the new one
INDEX = "model.safetensors.index.json"
PLAN, REPORT = "plan.json", "report.json"
MANIFEST_KEY = "checksums"  # key of the "lordjax" entry: the name of the manifest


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
    """Writes a model directory; the module's docstring lists its files.

    Args:
      directory: destination; must not exist, or be an empty directory.
      config: the model's architecture.
      params: the model's parameters; leaves may be kernels of any kind.
      hf_config: contents of the original ``config.json``.
      plan: the compression plan, written as ``plan.json``; None writes none.
      report: the report, written as ``report.json``; None writes none.
      write_tokenizer: function that writes tokenizer files into a directory.
      shard_bytes: largest number of tensor bytes per file.

    Returns:
      The absolute path of the directory.

    Raises:
      FileExistsError: if the destination is not free.
      OSError: if there is not enough room on the disk; says how much is needed and how much is
        free.
      ValueError: if a value is not finite, or a dtype is not supported; names the parameter.
    """
    directory, need = check_destination(directory), nbytes(params)
    check_room(directory, need)
    with staged(directory, need) as stage:
        writer, blocks = Shards(stage, MemoryStore(), shard_bytes), split_blocks(params)
        for name, block in blocks.items():
            writer[name] = block
        write_about(
            stage,
            writer.finish(list(blocks)),
            config,
            hf_config=hf_config,
            plan=plan,
            report=report,
            write_tokenizer=write_tokenizer,
        )
    return directory


def describe(config: ModelConfig, params: Any) -> dict[str, Any]:
    """Returns the metadata for `assembly.assemble`: kernel kinds, constants, architecture."""
    return _about(config, shards.describe(params))


def _about(config: ModelConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the "lordjax" entry of ``config.json`` from what `Shards.finish` found."""
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
    """Writes the files of a model directory that hold no tensors, and syncs all files to disk.

    Args:
      stage: the directory.
      found: the return value of `Shards.finish`.
      config: the model's architecture.
      hf_config: see `save`.
      plan: see `save`.
      report: see `save`.
      write_tokenizer: see `save`.
      also: function that writes more files into the directory, after all others but the manifest.
    """
    lordjax = {
        **_about(config, found),
        MANIFEST_KEY: MANIFEST,
        "method": None if plan is None else plan.method,
        "calibration": (report or {}).get("calibration"),
        "settings": (report or {}).get("settings"),
    }
    total = {"total_size": found["nbytes"]}
    write_json(stage / INDEX, {"metadata": total, "weight_map": found["index"]})
    write_json(stage / "config.json", {**hf_config, "lordjax": lordjax})
    if plan is not None:
        plan.write(stage / PLAN)
    if report is not None:
        measured = {**report, "file_bytes": found["file_bytes"]}
        write_text(stage / REPORT, json_files.dumps_measured(measured, indent=1) + "\n")
    if write_tokenizer is not None:
        write_tokenizer(stage)
    if also is not None:
        also(stage)
    write_json(stage / MANIFEST, Manifest.of(stage, found["tensors"]).to_json())
    sync(stage)
