"""Plugin of vLLM: models with factors and codes, as ``lordjax export --to vllm`` writes them.

vLLM calls `register` in each of its processes, by the entry point ``vllm.general_plugins``.
"""

from __future__ import annotations


def register() -> None:
    """Registers the quantization config ``lordjax`` with vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from lordjax.conversions.vllm_plugin.config import LordjaxConfig

    register_quantization_config("lordjax")(LordjaxConfig)
