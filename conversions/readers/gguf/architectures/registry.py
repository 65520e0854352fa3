"""The table of the supported GGUF architectures.

Names of tensors and keys are those of llama.cpp's ``gguf-py/gguf/constants.py``; what its
``convert_hf_to_gguf.py`` does to tensors is undone by `layouts`.
"""

from __future__ import annotations

from lordjax.conversions.readers.gguf.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from lordjax.conversions.readers.gguf.architectures.gpt import (
    GPT2,
    GPT_NEOX,
    PHI2,
    STABLELM,
    STARCODER,
)
from lordjax.conversions.readers.gguf.architectures.llama import (
    GRANITE,
    LLAMA,
    OLMO2,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STARCODER2,
)
from lordjax.conversions.readers.gguf.architectures.row import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi2": PHI2,
    "phi3": PHI3,
    "starcoder": STARCODER,
    "starcoder2": STARCODER2,
    "gpt2": GPT2,
    "gptneox": GPT_NEOX,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
}
