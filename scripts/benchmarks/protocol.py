"""Token sequences that all benchmarks use, and facts about the machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np


def protocol_tokens(
    data: str | Path, domain: str, calibration: int, windows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Loads the first calibration and evaluation sequences of a domain.

    Args:
      data: directory with ``calib_<domain>.npy`` and ``eval_<domain>.npy``, token ids
        ``[sequences, length]``.
      domain: name of the domain, such as ``wikitext2``.
      calibration: maximum number of calibration sequences.
      windows: maximum number of evaluation sequences.

    Returns:
      Calibration tokens and evaluation tokens, each ``[sequences, length]``.
    """
    import numpy as np

    counts = {"calib": calibration, "eval": windows}
    first, second = (np.load(Path(data) / f"{n}_{domain}.npy")[:k] for n, k in counts.items())
    return first, second


def environment() -> dict[str, str]:
    """Facts about the measuring environment: commit, device, cores, versions, dtype."""
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
