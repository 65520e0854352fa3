"""Stock shapes: the config of a model whose blocks were all made smaller alike, or removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lordjax.models.blocks import BLOCKS
from lordjax.models.config import ModelConfig
from lordjax.names import layer_index, layer_type

# Site path inside a block -> fields of `ModelConfig` that its rank changes.
MLP, HEADS = "mlp", "attention"


def reshaped(
    config: ModelConfig, ranks: Mapping[str, int | None]
) -> tuple[ModelConfig, tuple[int, ...]]:
    """Returns the config of a compressed model with stock shapes, and the blocks that are left.

    Args:
      config: the architecture of the original model.
      ranks: site path -> width of the MLP or number of key/value heads; None: as it was; 0 at all
        sites of a block: the block is removed.

    Raises:
      ValueError: if blocks that are left differ in their ranks, or none is left.
    """
    blocks: dict[int, dict[str, int | None]] = {i: {} for i in range(config.num_layers)}
    for path, rank in ranks.items():
        blocks[layer_index(path)][layer_type(path)] = rank
    left = [i for i, own in blocks.items() if not own or any(rank != 0 for rank in own.values())]
    kinds = {name for i in left for name in blocks[i]}
    found = {name: {blocks[i].get(name) for i in left} for name in kinds}
    uneven = sorted(name for name, values in found.items() if len(values) > 1 or 0 in values)
    if uneven or not left:
        raise ValueError(
            f"the plan has no stock shape: {', '.join(uneven) or 'no block'} differs between "
            "blocks; give one rank for all blocks, or 0 at all sites of a block to remove it"
        )
    mlp, heads = ((found.get(name) or {None}).pop() for name in (MLP, HEADS))
    kv_heads = heads or config.num_kv_heads
    windows = None if config.windows is None else tuple(config.windows[i] for i in left)
    new = dataclasses.replace(
        config,
        mlp_size=mlp or config.mlp_size,
        num_kv_heads=kv_heads,
        num_heads=config.num_heads // config.num_kv_heads * kv_heads,
        num_layers=len(left),
        windows=windows,
    )
    return new, tuple(left)


def blocks_are_alike(config: ModelConfig) -> bool:
    """Returns whether a block can be removed: it adds to its input, and all blocks see alike."""
    return config.windows is None and config.num_layers > 1 and not BLOCKS[config.block].norm_sum
