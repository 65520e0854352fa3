"""A Nemotron-NAS model for transformers, written by ``lordjax export --to nemotron-nas``.

This file needs only torch and transformers. vLLM and TensorRT-LLM have models of their own for this
architecture, and read `DeciLMConfig` only.
"""

import dataclasses
from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

MULTIPLE = 256  # widths are rounded up to a multiple of this


@dataclasses.dataclass
class Attention:
    """What a block's config says of its attention."""

    n_heads_in_group: int | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: Any = None
    num_sink_tokens: int | None = None
    unshifted_sink: bool = False
    use_prefill_window_in_sink_attention: bool = False
    window_length: int | None = None


@dataclasses.dataclass
class FFN:
    """What a block's config says of its MLP."""

    ffn_mult: float | None = None
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: Any = None


@dataclasses.dataclass
class Block:
    """The config of a block."""

    attention: Attention
    ffn: FFN


def block_of(value: Any) -> Block:
    """Returns a block's config from JSON's dicts."""
    if isinstance(value, Block):
        return value
    return Block(Attention(**value["attention"]), FFN(**value["ffn"]))


class DeciLMConfig(LlamaConfig):
    """Llama's config with ``block_configs``, whose entries have attributes."""

    model_type = "nemotron-nas"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs":
            value = [block_of(each) for each in value or ()]
        super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as JSON's dicts."""
        found = super().to_dict()
        blocks = getattr(self, "block_configs", [])
        return found | {"block_configs": [dataclasses.asdict(block) for block in blocks]}


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """Returns the width of an MLP, as the engines compute it."""
    return -(-int(2 * ffn_mult * hidden_size / 3) // MULTIPLE) * MULTIPLE


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama with an MLP width for every block."""

    config_class = DeciLMConfig

    def __init__(self, config: Any):
        super().__init__(config)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            if block.attention.no_op or block.ffn.no_op:
                raise ValueError("block_configs: no_op is not supported by this file")
            mlp: Any = layer.mlp
            hidden, width = config.hidden_size, width_of(block.ffn.ffn_mult, config.hidden_size)
            mlp.intermediate_size = width
            mlp.gate_proj = nn.Linear(hidden, width, bias=config.mlp_bias)
            mlp.up_proj = nn.Linear(hidden, width, bias=config.mlp_bias)
            mlp.down_proj = nn.Linear(width, hidden, bias=config.mlp_bias)
