"""Exports a model as an Orbax checkpoint.

A directory holds::

    params/         nested dicts of arrays, for ocp.StandardCheckpointer().restore(...)
    manifest.json   kinds and static fields of kernels, `ModelConfig`, the original config.json
    checksums.json  checksums of these files
    tokenizer files
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from lordjax.conversions.exporters.hf_files import ExportSpec
from lordjax.kernels import trees
from lordjax.models.config import ModelConfig
from lordjax.names import layer
from lordjax.runtime.input_files import read_json, reading
from lordjax.runtime.orbax_log import unlogged
from lordjax.storage import assembly, checkpoint, checksums, shards
from lordjax.storage.tensor_files import write_json

PARAMS, MANIFEST = "params", "manifest.json"
_ADVICE = "export again"


def orbax(job: ExportSpec, stage: Path) -> None:
    """Writes the checkpoint and its manifest into the directory ``stage``."""
    source = job.source
    blocks = {layer(i): source.block(i) for i in range(source.config.num_layers)}
    params = {**source.non_block_params(), **blocks}
    with unlogged(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(stage / PARAMS, trees.unflatten(shards.tensors(params)))
    manifest = {
        "lordjax": checkpoint.describe(source.config, params),
        "config": dict(source.hf_config),
    }
    write_json(stage / MANIFEST, manifest)
    write_json(stage / checksums.MANIFEST, checksums.Manifest.of(stage, {}).to_json())


def restore_orbax(directory: str | Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the config and the parameters of an Orbax export.

    Args:
      directory: directory that `orbax` wrote.

    Returns:
      The architecture, and the parameters as a nested dict with lordjax kernels.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the manifest or a kernel is damaged.
    """
    directory = Path(directory).resolve()
    if (directory / checksums.MANIFEST).exists():  # older versions wrote none
        checksums.Manifest.read(directory, _ADVICE).check_files()
    manifest = read_json(directory / MANIFEST, _ADVICE)
    damage = reading(directory / PARAMS, "damaged parameters", _ADVICE)
    with damage, ocp.StandardCheckpointer() as checkpointer:
        tree = trees.flatten(checkpointer.restore(directory / PARAMS))
    with reading(directory / MANIFEST, "damaged, or of other parameters", _ADVICE):
        meta = manifest["lordjax"]
        assembly.check_kernels(meta)
        return ModelConfig.from_json(meta["model"]), assembly.assemble(tree, meta)
