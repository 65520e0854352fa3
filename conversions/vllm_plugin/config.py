"""The quantization config ``lordjax`` of vLLM, and its linear method.

Written against vLLM's interface as published: ``QuantizationConfig`` and ``LinearMethodBase`` of
``vllm/model_executor/layers`` (026bb17, 0036d38), and the loaders of its models, which replace
``.q_proj`` by ``.qkv_proj`` in the name of a tensor and give its ``weight_loader`` the name of the
shard (``models/nemotron_nas.py``, 00bd149). Only vLLM imports this module.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
)

from lordjax.conversions.exporters.modeling_lordjax import CompressedLinear
from lordjax.conversions.vllm_plugin.shards import cut

NAME, FORMAT = "lordjax", 1
# Merged layer of vLLM -> its parts, where the model does not say it.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of shards -> place in the merged layer


class LordjaxConfig(QuantizationConfig):
    """Which layers of a model have factors and codes.

    Args:
      linears: name of a Hugging Face layer -> its description (`modeling_lordjax`) with its
        original sizes; other layers are plain.
    """

    def __init__(self, linears: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self.linears = linears

    @classmethod
    def get_name(cls) -> str:
        """Returns the name of the quantization method."""
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Returns the dtypes of activations."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the least compute capability of a GPU; there are no kernels of our own."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns further config files: none, all is in ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LordjaxConfig:
        """Returns the config in the key ``quantization_config``.

        Raises:
          ValueError: if it is of another version.
        """
        if config.get("format") != FORMAT:
            raise ValueError(
                f"quantization_config: format {config.get('format')!r}, expected {FORMAT}; export "
                "the model with this version of lordjax"
            )
        return cls(config["linears"])

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Returns the linear method of a layer; None if it is no linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name) or MERGED.get(name, (name,))
        specs = [self.linears.get(f"{parent}.{part}" if parent else part) for part in parts]
        found = [spec for spec in specs if spec is not None]
        if not found:
            return UnquantizedLinearMethod()
        if len(found) < len(specs):
            raise ValueError(
                f"quantization_config: {prefix} has a description of {len(found)} of its "
                f"{len(specs)} matrices; export the model again"
            )
        return LordjaxLinearMethod(prefix, found)


class LordjaxLinearMethod(LinearMethodBase):
    """Holds one or several matrices as pairs, codes or their sum; codes are decoded at every use.

    Under tensor parallelism a rank keeps its part of dense matrices and of the wide axis of pairs.
    Codes are replicated, because a code is not a part of a row, and a rank decodes all of them.

    Args:
      prefix: name of the layer, for messages.
      specs: for each matrix of the layer its description, with its original sizes ``whole``.
    """

    def __init__(self, prefix: str, specs: Sequence[Mapping[str, Any]]):
        self.prefix, self.specs = prefix, specs
        self.linears: list[CompressedLinear] = []
        self.missing: list[set[str]] = []  # tensors of each matrix that were not loaded yet
        self.sizes: list[tuple[int, int]] = []  # inputs and outputs of each matrix on this rank

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Creates the matrices, and parameters under the names of the checkpoint's tensors.

        Args:
          layer: the layer of vLLM.
          input_size_per_partition: inputs on this rank.
          output_partition_sizes: outputs of each matrix on this rank.
          input_size: inputs on all ranks.
          output_size: outputs of all matrices on all ranks.
          params_dtype: dtype of plain weights and factors.
          **extra_weight_attrs: vLLM's own loader of weights, which is not used.
        """
        del input_size, output_size, extra_weight_attrs
        self.sizes = [(input_size_per_partition, own) for own in output_partition_sizes]
        # Not submodules until they are loaded, so that only the names of the tensors are seen.
        self.linears = [
            CompressedLinear({**spec, "bias": False}).to(params_dtype) for spec in self.specs
        ]
        self.missing = [set(linear.state_dict()) for linear in self.linears]
        for name in sorted(set().union(*self.missing)):
            self._register(layer, name)

    def _register(self, layer: nn.Module, name: str) -> None:
        """Registers an empty parameter whose loader fills the tensor of that name in a matrix."""
        *above, last = name.split(".")
        for step in above:
            if step not in layer._modules:
                layer.add_module(step, nn.Module())
            layer = layer.get_submodule(step)
        parameter = nn.Parameter(torch.empty(0), requires_grad=False)
        parameter.weight_loader = functools.partial(self._load, name)
        layer.register_parameter(last, parameter)

    def _load(
        self, name: str, param: nn.Parameter, loaded: torch.Tensor, shard: int | str | None = None
    ) -> None:
        """Copies a tensor of the checkpoint into a matrix."""
        del param
        i = SHARDS[shard] if isinstance(shard, str) else shard or 0
        target = self.linears[i].state_dict().get(name)
        if target is None or target.shape != loaded.shape:
            expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
            raise ValueError(
                f"{self.prefix}: {name} of matrix {i} has shape {tuple(loaded.shape)}; expected "
                f"{expected}; export the model again"
            )
        target.copy_(loaded)
        self.missing[i].discard(name)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keeps what this rank needs, and removes the parameters of the checkpoint.

        Raises:
          ValueError: if tensors were not loaded.
        """
        missing = sorted(set().union(*self.missing))
        if missing:
            raise ValueError(
                f"{self.prefix}: the checkpoint has no {', '.join(missing)}; export the model again"
            )
        for name in [name for name in layer._parameters if name != "bias"]:
            delattr(layer, name)
        for name in list(layer._modules):
            delattr(layer, name)
        rank, ranks = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
        shards = []
        for linear, spec, own in zip(self.linears, self.specs, self.sizes, strict=True):
            parts = (_part(*axis, rank, ranks) for axis in zip(spec["whole"], own, strict=True))
            shards.append(cut(linear, spec, *parts))
        layer.shards = nn.ModuleList(shards)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiplies the matrices with ``x``."""
        shards: Any = layer.shards
        y = torch.cat([shard(x) for shard in shards], dim=-1)
        return y if bias is None else y + bias


def _part(whole: int, own: int, rank: int, ranks: int) -> range:
    """Returns what of an axis is a rank's; several ranks share a part if there are few of them."""
    parts = whole // own
    first = rank * parts // ranks * own
    return range(first, first + own)
