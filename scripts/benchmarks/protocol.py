"""Tokens of the measuring protocol, and facts about the machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np


def protocol_tokens(
    data: str | Path, domain: str, calibration: int, windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first calibration and evaluation windows of a benchmark's domain, token ids."""
    import numpy as np

    counts = {"calib": calibration, "eval": windows}
    first, second = (np.load(Path(data) / f"{n}_{domain}.npy")[:k] for n, k in counts.items())
    return first, second


def environment() -> dict[str, str]:
    """Where a number was measured: commit, device, versions, dtype."""
    import platform

    import jax

    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "device": str(jax.devices()[0].device_kind),
        "cores": str(os.cpu_count()),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "dtype": "float32",
    }
