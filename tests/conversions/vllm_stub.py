"""The part of vLLM's interface that the plugin uses, as published, with layers on the CPU.

Linear layers call a quantization method as vLLM's do. `load` walks over the tensors of a checkpoint
as vLLM's Llama does: names of merged layers, and a weight loader that is told the shard.
"""

import sys
import types

import torch
from torch import nn

MAPPING = [
    (".qkv_proj", ".q_proj", "q"),
    (".qkv_proj", ".k_proj", "k"),
    (".qkv_proj", ".v_proj", "v"),
    (".gate_up_proj", ".gate_proj", 0),
    (".gate_up_proj", ".up_proj", 1),
]
REGISTERED = {}


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class LinearBase(nn.Module):
    """A linear layer of one rank: `outputs` are all of its matrices', on all ranks."""

    def __init__(self, config, prefix, inputs, outputs, rank, ranks, *, split):
        super().__init__()
        self.tp_rank, self.tp_size = rank, ranks
        self.quant_method = config.get_quant_method(self, prefix)
        own_inputs = inputs // ranks if split == "inputs" else inputs
        # A key/value head that is needed by several ranks is on each of them.
        own = [n if split == "inputs" else max(n // ranks, least) for n, least in outputs]
        self.quant_method.create_weights(
            self,
            own_inputs,
            own,
            inputs,
            sum(own) * (1 if split == "inputs" else ranks),
            torch.float32,
            weight_loader=None,
        )

    def forward(self, x):
        return self.quant_method.apply(self, x, None)


def install(monkeypatch):
    """Puts the stub in vLLM's place."""
    modules = {}
    for name in ("", ".model_executor", ".model_executor.layers"):
        modules[f"vllm{name}"] = types.ModuleType(f"vllm{name}")
    layers = "vllm.model_executor.layers"
    linear = types.ModuleType(f"{layers}.linear")
    linear.LinearBase, linear.LinearMethodBase = LinearBase, LinearMethodBase
    linear.UnquantizedLinearMethod = UnquantizedLinearMethod
    quantization = types.ModuleType(f"{layers}.quantization")
    quantization.register_quantization_config = lambda name: (
        lambda cls: REGISTERED.setdefault(name, cls)
    )
    base = types.ModuleType(f"{layers}.quantization.base_config")
    base.QuantizationConfig = QuantizationConfig
    modules |= {m.__name__: m for m in (linear, quantization, base)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def load(layers, tensors):
    """Loads tensors into layers ``{name in vLLM: layer}``, and processes them."""
    parameters = {
        f"{name}.{below}": parameter
        for name, layer in layers.items()
        for below, parameter in layer.named_parameters()
    }
    for name, tensor in tensors.items():
        for merged, single, shard in MAPPING:
            if single in name:
                parameter = parameters[name.replace(single, merged)]
                parameter.weight_loader(parameter, tensor, shard)
                break
        else:
            if name in parameters:
                parameters[name].weight_loader(parameters[name], tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
