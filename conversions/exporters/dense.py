"""A model of ours as its original family stores it: every matrix multiplied out, in its old shape.

Narrower layers are filled up with zeros, and kept rotary pairs go back to their own places, which
is the same function. Biases that compression added need a family that can have them: its switch in
``config.json`` is turned on, and layers without one get zeros.
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
    stored,
    write_config,
    write_shards,
)
from lordjax.conversions.families.registry import TensorSource, family_of, tensor_table
from lordjax.kernels import base, trees
from lordjax.models import head_axes
from lordjax.models.config import ModelConfig
from lordjax.names import layer_type

# Field of `ModelConfig` that says whether a layer has a bias.
_SWITCHES = {
    **dict.fromkeys(("q", "k", "v"), "qkv_bias"),
    "o": "out_bias",
    **dict.fromkeys(("gate", "up", "down"), "mlp_bias"),
}
OUTPUT, OUTPUT_BIAS = "attention/o/kernel", "attention/o/bias"
VALUES, VALUES_BIAS = "attention/v/kernel", "attention/v/bias"


def dense(job: ExportSpec, stage: Path) -> None:
    """Writes the directory."""
    hf_config, table = with_biases(job.source)
    write_shards(stage, _tensors(job, table), job.shard_bytes)
    write_config(stage, hf_config, job.dtype)


def _tensors(
    job: ExportSpec, table: Mapping[str, TensorSource]
) -> Iterator[tuple[str, np.ndarray]]:
    source = job.source
    rest = base.materialize(trees.flatten(source.non_block_params()))
    yield from stored(outside(table), rest, job.dtype)
    for i in range(source.config.num_layers):
        rows = of_block(table, i)
        yield from stored(rows, widened(flat_block(source, i), rows, source.config), job.dtype)


def with_biases(source: Opened) -> tuple[dict[str, Any], dict[str, TensorSource]]:
    """The original config with the switches of added biases turned on, and its table.

    Raises:
      ValueError: if the family has no place for a bias; names the layers.
    """
    hf_config, leaves = dict(source.hf_config), source.leaves()
    family, added = family_of(hf_config), leaves.keys() - tensor_table(hf_config).keys()
    for path in added:
        *_, layer, name = path.split("/")
        key = family.fields.get(_SWITCHES.get(layer, "")) if name == "bias" else None
        hf_config |= {} if key is None else {key: True}
    table = tensor_table(hf_config)
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
            f"{family.model_type} models have no place for {len(homeless)} parameters that "
            f"compression added ({', '.join(kinds)}; the first is {homeless[0]}); export with "
            "--to factored"
        )
    return hf_config, table


def widened(
    flat: Mapping[str, Any], rows: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, Any]:
    """A block's parameters by path, dense and in the shapes of ``rows``, zeros where none were."""
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
    """Whether a bias of the output can be one of values: see `_carry`."""
    return VALUES_BIAS in rows and flat[VALUES].shape[-1] < rows[VALUES].loaded_shape[-1]


def _carry(wide: dict[str, Any], column: int) -> None:
    """Moves the bias of the output into a column of the values that is free.

    A value that is 1 everywhere stays 1 through attention, whose rows sum to one.
    """
    wide[VALUES_BIAS][column] = 1
    wide[OUTPUT][column] = wide.pop(OUTPUT_BIAS)
