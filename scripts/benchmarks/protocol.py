"""Token sequences and options that benchmarks share, and facts about the machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from lordjax.data.token_windows import array_length, load_tokens
from lordjax.runtime import json_files
from lordjax.scripts.flags.types import OutputPath
from lordjax.storage.tensor_files import write_text

out_option = click.option(
    "--out",
    type=OutputPath(file=True),
    help="JSON file for the results; until they are complete, OUT.partial. An existing file is "
    "replaced then.",
)


def write_results(out: str | None, results: Any, *, complete: bool = True) -> None:
    """Writes the results of a benchmark atomically; an older file stays until they are complete.

    Args:
      out: the file; None writes nothing.
      results: what JSON can hold.
      complete: whether it is all of them; else they go into ``OUT.partial``.

    Raises:
      OSError: if the file cannot be written.
    """
    if out is None:
        return
    path = Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.partial")
    text = json_files.dumps_measured(results, indent=1) + "\n"
    write_text(path if complete else unfinished, text)
    if complete:
        unfinished.unlink(missing_ok=True)


def token_options(
    *,
    domain: str | None = None,
    domains: str | None = None,
    calibration: int | None = None,
    windows: int | None = None,
    required: bool = True,
) -> Callable[[Any], Any]:
    """Returns a decorator that adds the options of `protocol_tokens` to a command.

    Args:
      domain: default of ``--domain``; None: no such option.
      domains: default of ``--domains``, which takes several; None: no such option.
      calibration: default of ``--calibration-windows``; None: no such option.
      windows: default of ``--windows``; None: no such option.
      required: whether ``--data`` must be given.
    """
    contents = "Directory with token arrays calib_DOMAIN.npy and eval_DOMAIN.npy"
    directory = click.Path(exists=True, file_okay=False)
    options = [
        click.option(
            "--data",
            required=required,
            type=directory,
            help=f"{contents}." if required else f"{contents} (with a model).",
        )
    ]
    for flag, default, meaning in (
        ("--domain", domain, "Domain of the token arrays."),
        ("--domains", domains, "Domains of the token arrays, separated by commas."),
        ("--calibration-windows", calibration, "Number of calibration sequences."),
        ("--windows", windows, "Number of evaluation sequences."),
    ):
        if default is not None:
            options.append(click.option(flag, default=default, show_default=True, help=meaning))

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


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

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is no array of token ids.
    """
    counts = {"calib": calibration, "eval": windows}
    first, second = (_rows(Path(data) / f"{n}_{domain}.npy", k) for n, k in counts.items())
    return first, second


def _rows(path: Path, most: int) -> np.ndarray:
    length = array_length(path) or 2  # of a file that is missing; the reader says so
    return load_tokens(path, tokenizer=None, seq_len=length, vocab_size=2**31 - 1, samples=most)


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
