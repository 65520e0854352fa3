"""Exports a model in the format of its original family: dense matrices in their original shapes.

Pruned layers are zero-padded, and kept rotary pairs return to their original columns, which does
not change the function. A bias that compression added needs a family with a config key for it: the
key is turned on in ``config.json``, and the other layers that it covers get zero biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lordjax.conversions.exporters.hf_files import (
    ExportSpec,
    Opened,
    flat_block,
    of_block,
    outside,
    outside_blocks,
    stored,
    write_config,
    write_shards,
)
from lordjax.conversions.families.registry import TensorSource, family_of, tensor_table
from lordjax.kernels import base
from lordjax.models import head_axes
from lordjax.models.config import ModelConfig
from lordjax.names import layer_type

# Layer -> field of `ModelConfig` that says whether it has a bias.
_SWITCHES = {
    **dict.fromkeys(("q", "k", "v"), "qkv_bias"),
    "o": "out_bias",
    **dict.fromkeys(("gate", "up", "down"), "mlp_bias"),
}
OUTPUT, OUTPUT_BIAS = "attention/o/kernel", "attention/o/bias"
VALUES, VALUES_BIAS = "attention/v/kernel", "attention/v/bias"


def dense(job: ExportSpec, stage: Path) -> None:
    """Writes the dense model into the directory ``stage``."""
    hf_config, table = with_biases(job.source)
    write_shards(stage, _tensors(job, table), job.shard_bytes)
    write_config(stage, hf_config, job.dtype)


def _tensors(
    job: ExportSpec, table: Mapping[str, TensorSource]
) -> Iterator[tuple[str, np.ndarray]]:
    source = job.source
    rest = outside_blocks(source)
    yield from stored(outside(table), rest, job.dtype)
    for i in range(source.config.num_layers):
        rows = of_block(table, i)
        yield from stored(rows, widened(flat_block(source, i), rows, source.config), job.dtype)


def with_biases(source: Opened) -> tuple[dict[str, Any], dict[str, TensorSource]]:
    """Turns on the biases that compression added in the original config.

    Returns:
      The config, and its tensor table.

    Raises:
      ValueError: if the family cannot store an added bias; the message names the layers.
    """
    hf_config, leaves = dict(source.hf_config), source.leaves()
    family, added = (
        family_of(hf_config),
        leaves.keys() - tensor_table(hf_config, leaves=leaves).keys(),
    )
    for path in added:
        *_, layer, name = path.split("/")
        key = family.fields.get(_SWITCHES.get(layer, "")) if name == "bias" else None
        hf_config |= {} if key is None else {key: True}
    table = tensor_table(hf_config, leaves=leaves)
    homeless = []
    for path in sorted(leaves.keys() - table.keys()):
        block, _, inside = path.partition("/")
        if inside == head_axes.ROPE_INDEX or (
            inside == OUTPUT_BIAS
            and _has_room(*(of_block(a, int(block.split("_")[1])) for a in (leaves, table)))
        ):
            continue
        homeless.append(path)
    if homeless:
        kinds = sorted({layer_type(path) for path in homeless})
        raise ValueError(
            f"{family.model_type} models cannot store {len(homeless)} parameters that "
            f"compression added ({', '.join(kinds)}; the first is {homeless[0]}); export with "
            "--to factored"
        )
    return hf_config, table


def widened(
    flat: Mapping[str, Any], rows: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, Any]:
    """Returns the dense, zero-padded parameters of a block by path.

    Args:
      flat: parameters of the block by path.
      rows: tensor table of the block, which gives the original shapes.
      config: architecture of the model.
    """
    places, wide = head_axes.places(flat, config), {}
    for path, leaf in flat.items():
        kernel = path.replace("/bias", "/kernel")
        if kernel not in places or path not in rows:
            wide[path] = leaf
            continue
        inputs, outputs = places[kernel]
        leaf = np.asarray(base.materialize(leaf))
        full = np.zeros(rows[path].loaded_shape, leaf.dtype)
        full[np.ix_(inputs, outputs) if path == kernel else outputs] = leaf
        wide[path] = full
    if OUTPUT_BIAS in flat and OUTPUT_BIAS not in rows:
        _carry(wide, flat[VALUES].shape[-1] // config.num_kv_heads)
    return wide


def _has_room(flat: Mapping[str, Any], rows: Mapping[str, TensorSource]) -> bool:
    """Returns whether `_carry` can move the output bias into a bias of the values."""
    return VALUES_BIAS in rows and flat[VALUES].shape[-1] < rows[VALUES].loaded_shape[-1]


def _carry(wide: dict[str, Any], column: int) -> None:
    """Moves the output bias of the attention into a free column of the values.

    The value bias sets that column to 1 for every token. Attention weights sum to 1, so the column
    stays 1 behind the attention, and its row in the output matrix acts as the bias.
    """
    wide[VALUES_BIAS][column] = 1
    wide[OUTPUT][column] = wide.pop(OUTPUT_BIAS)
