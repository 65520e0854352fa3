"""Fine-tuning of compressed models: recipes, adapters, the jitted step, and runs on disk."""

from __future__ import annotations

from typing import Any

__all__ = ["make_step"]


def __getattr__(name: str) -> Any:
    """Loads `make_step` on first use, since it imports JAX."""
    if name != "make_step":
        raise AttributeError(f"module 'lordjax.finetune' has no attribute {name!r}")
    from lordjax.finetune.step import make_step

    return make_step
