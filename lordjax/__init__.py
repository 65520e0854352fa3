"""Compresses pretrained transformers by matrix decomposition, in JAX.

The names here are the public API. They are loaded on first use, so that importing the package costs
nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {  # public name -> module that defines it
    "InMemory": "lordjax.models.source",
    "Kernel": "lordjax.kernels.base",
    "LowRank": "lordjax.kernels.low_rank",
    "LowRankPlusQuantized": "lordjax.kernels.quantized",
    "METHODS": "lordjax.methods",
    "ModelConfig": "lordjax.models",
    "NFQuantized": "lordjax.kernels.quantized",
    "Plan": "lordjax.allocation.plan",
    "Prepared": "lordjax.compression.prepared",
    "RECIPES": "lordjax.finetune.recipes",
    "QUANTIZERS": "lordjax.allocation.candidates",
    "Quantizer": "lordjax.compression.quantizer",
    "Result": "lordjax.compression.result",
    "Transformer": "lordjax.models",
    "add_adapters": "lordjax.finetune.adapters",
    "allocate": "lordjax.allocation.policies",
    "collect": "lordjax.functions.collecting",
    "complete": "lordjax.generation.completion",
    "compress": "lordjax.compression.low_rank",
    "compress_params": "lordjax.functions.compressing",
    "compressed": "lordjax.functions.running",
    "encode": "lordjax.kernels.convert",
    "factorize": "lordjax.kernels.convert",
    "find_sites": "lordjax.functions.finding",
    "generate": "lordjax.generation.decode",
    "load": "lordjax.compression.elastic",
    "load_params": "lordjax.functions.saving",
    "materialize": "lordjax.kernels.base",
    "matmul": "lordjax.kernels.base",
    "merge": "lordjax.finetune.adapters",
    "nbytes": "lordjax.kernels.base",
    "perplexity": "lordjax.evaluate",
    "prepare": "lordjax.compression.low_rank",
    "prepare_quantized": "lordjax.compression.quantized",
    "quantize": "lordjax.compression.quantized",
    "save": "lordjax.storage.checkpoint",
    "save_params": "lordjax.functions.saving",
    "stream": "lordjax.generation.decode",
    "train": "lordjax.finetune.training_run",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lordjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
