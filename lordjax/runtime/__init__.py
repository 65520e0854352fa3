"""Devices, processes, progress, scheduling, operation counts, JSON files."""

from __future__ import annotations

from typing import Any

__all__ = ["make_mesh"]


def __getattr__(name: str) -> Any:
    """Imports `make_mesh` on first use, because that imports JAX."""
    if name != "make_mesh":
        raise AttributeError(f"module 'lordjax.runtime' has no attribute {name!r}")
    from lordjax.runtime.mesh import make_mesh

    return make_mesh
