"""``lordjax demo``: compress a small model to several sizes, measure and compare the results.

The model is SmolLM2-135M-Instruct (Apache-2.0). It comes in a wheel from PyPI, so that no other
service is needed. Calibration uses the modules a-m of Python's standard library; evaluation uses
the modules n-z.

::

    OUT/dense, OUT/modegpt-0.8, OUT/auto-4.1 …   model directories, for every command
    OUT/picture.png                              perplexity against bytes and against speed
    OUT/demo.json                                settings and measured rows of the table

A later run keeps the models and the rows that exist, and makes only those that are missing. So an
interrupted demo can be continued.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.runtime.input_files import read_json, reading
from lordjax.scripts.console import check_output, format_bytes, progress_report, say
from lordjax.scripts.demo_model import WHEEL, corpora, fetch_model
from lordjax.scripts.opened_model import Model, file_bytes, open_model
from lordjax.scripts.verbs import demo_rows
from lordjax.scripts.verbs.demo_rows import DENSE, Variant, measured
from lordjax.storage.lock import LOCK, locked

if TYPE_CHECKING:
    from lordjax.compression.result import Result
    from lordjax.runtime.progress import Progress

MODEL_BYTES = 270_000_000  # size of the dense model on disk
CODES = "auto"  # method of the quantized models
# Short cuts of the quantized models: one length of blocks, and two alternations between quantized
# weights and low-rank term. They save a minute for 1 % of perplexity (docs/pages/tried.md).
BLOCK, STEPS = 32, 2
RECORD, PICTURE = "demo.json", "picture.png"


def run_demo(
    out: str, keeps: tuple[float, ...], bits: tuple[float, ...], samples: int, windows: int
) -> dict[str, Any]:
    """Downloads a model, compresses it to every budget, measures the results and plots them.

    Args:
      out: output directory; new, empty, or left by a demo with the same settings.
      keeps: budgets of the default method, as kept fractions of the block weights.
      bits: budgets of method ``auto``, in bits per block weight.
      samples: number of calibration sequences.
      windows: number of evaluation sequences.

    Returns:
      The output directory, facts of the original file, the rows of the table, the prompt, the
      settings and the elapsed seconds.

    Raises:
      FileExistsError: if ``out`` has other contents.
      OSError: if the model cannot be downloaded, the disk has too little room, or another process
        works in ``out``.
      ValueError: if ``out`` belongs to a demo with other settings.
    """
    from lordjax.methods import DEFAULT_METHOD

    start, directory = time.perf_counter(), Path(out).expanduser()
    variants = [Variant(DENSE)]
    for method, budgets in ((DEFAULT_METHOD, keeps), (CODES, bits)):
        variants += [Variant(method, budget) for budget in sorted(set(budgets), reverse=True)]
    settings = {"model": WHEEL, "samples": samples, "windows": windows}
    finished_rows(directory, settings)  # what belongs to somebody else is not even locked
    with locked(directory, f"what is finished is kept in {directory}"):
        model, rows = _models_and_rows(directory, variants, settings)
    shown = [rows[variant.name] for variant in variants]
    return {
        "output": str(directory),
        "original": {"file": model.path.name, "bytes": file_bytes(model.path)},
        "rows": shown,
        "prompt": demo_rows.PROMPT,
        "settings": settings,
        "seconds": time.perf_counter() - start,
    }


def _models_and_rows(
    directory: Path, variants: list[Variant], settings: dict[str, Any]
) -> tuple[Model, dict[str, dict[str, Any]]]:
    """Makes what is missing in a locked directory; returns the original model and all rows."""
    from lordjax.storage.room import check_room

    rows = finished_rows(directory, settings)
    if (directory / RECORD).exists():
        say(f"going on in {directory}: what is finished there is not done again")
    todo = [variant for variant in variants if not (directory / variant.name).exists()]
    check_room(directory, len(todo) * MODEL_BYTES)
    model = open_model(str(fetch_model()))
    calibration, evaluation = corpora(model, settings["samples"], settings["windows"])
    write_record(directory, settings, rows)
    make(model, calibration, todo, directory)
    tokenizer = model.tokenizer()
    for variant in variants:
        if variant.name not in rows:
            rows[variant.name] = measured(variant, directory, evaluation, tokenizer)
            write_record(directory, settings, rows)
    draw_rows([rows[variant.name] for variant in variants], directory / PICTURE)
    return model, rows


def finished_rows(directory: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that an earlier demo with the same settings measured, by model name.

    Raises:
      FileExistsError: if the directory has other contents.
      ValueError: if the earlier demo had other settings, or its record is damaged.
    """
    file = directory / RECORD
    if not file.exists():
        if not directory.is_dir() or {path.name for path in directory.iterdir()} != {LOCK}:
            check_output(directory)
        return {}
    advice = f"give another --out, or remove {directory} to start over"
    with reading(file, "not the record of a demo", advice):
        found = read_json(file, advice)
        before, rows = dict(found["settings"]), dict(found["rows"])
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        differences = ", ".join(f"{n} was {before.get(n)}, is {settings[n]}" for n in changed)
        raise ValueError(f"{directory}: holds a demo with other settings ({differences}); {advice}")
    return rows


def write_record(directory: Path, settings: dict[str, Any], rows: dict[str, Any]) -> None:
    """Writes settings and rows into `RECORD`, as one atomic write."""
    from lordjax.storage.tensor_files import write_json

    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD, {"settings": settings, "rows": rows})


def make(model: Model, calibration: Any, variants: list[Variant], directory: Path) -> None:
    """Writes a model directory for every variant.

    A method calibrates once for all of its budgets.
    """
    from lordjax.data.token_windows import fingerprint
    from lordjax.storage import checkpoint

    facts: dict[str, Any] = {"source": "Python standard library, modules a-m"}
    facts |= {"windows": len(calibration), "seq_len": calibration.shape[1]}
    facts |= {"tokens_sha256": fingerprint(calibration)}
    for method in dict.fromkeys(variant.method for variant in variants):
        own = [variant for variant in variants if variant.method == method]
        for variant, found, seconds in results(model, calibration, own):
            report = {**found.pop("report"), "calibration": facts, "demo_seconds": seconds}
            report["settings"] = {"model": WHEEL, **dataclasses.asdict(variant), "command": "demo"}
            checkpoint.save(
                directory / variant.name,
                model.config,
                hf_config=model.hf_config,
                report=report,
                write_tokenizer=model.write_tokenizer,
                **found,
            )


def results(
    model: Model, calibration: Any, variants: list[Variant]
) -> Iterator[tuple[Variant, dict[str, Any], float]]:
    """Yields variant, results and seconds for every variant of one method.

    The results are the parameters, the report and, for a compressed model, the plan. The seconds
    of a variant include the calibration, which all variants share. The method computes in float32
    and rounds to the dtype in which the original model is stored.
    """
    from lordjax.kernels.kinds import astype

    method, dtype, start = variants[0].method, model.stored_dtype, time.perf_counter()
    if method == DENSE:
        params = model.params() if dtype is None else astype(model.params(), dtype)
        yield variants[0], {"params": params, "report": {}}, time.perf_counter() - start
        return
    names = " and ".join(f"{variant.budget:g}" for variant in variants)
    what = "bits per weight" if method == CODES else "of the weights kept"
    say(f"method {method}, {names} {what}: {len(calibration)} calibration windows for all of them")
    with progress_report() as progress:
        compress = prepared(model, calibration, method, progress)
        shared = time.perf_counter() - start
        for variant in variants:
            start = time.perf_counter()
            result = compress(variant.budget)
            found = {"params": result.params, "plan": result.plan, "report": result.report}
            yield variant, found, shared + time.perf_counter() - start


def prepared(
    model: Model, calibration: Any, method: str, progress: Progress
) -> Callable[[Any], Result]:
    """Calibrates a method, and returns a function that compresses the model to a budget."""
    from lordjax.allocation.candidates import FORMATS
    from lordjax.compression.low_rank import prepare
    from lordjax.compression.quantized import prepare_quantized

    dtype = model.stored_dtype
    if method != CODES:
        factored = prepare(model.source, calibration, method=method, progress=progress)
        return lambda keep: factored.compress(keep, dtype=dtype)
    quantizer = prepare_quantized(
        model.source,
        calibration,
        method=method,
        formats=[form for form in FORMATS if form.block == BLOCK or form.bits == 8],
        dtype=dtype,
        steps=STEPS,
        progress=progress,
    )
    _ = quantizer.tables  # computed on first access; count it as calibration
    return lambda bits: quantizer.compress(bits=bits)


def draw_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots perplexity against bytes on disk and against decoding speed."""
    from lordjax.scripts.verbs.benchmark import draw

    points = [
        {"model": row["name"], "decode": {"1": row["tokens_per_second"]}} | row for row in rows
    ]
    draw(points, path)


def show(result: dict[str, Any]) -> None:
    """Prints the table, each method's continuation of the prompt, and further commands."""
    rows, out = result["rows"], result["output"]
    _show_table(rows, result["original"])
    ends = {row["method"]: row for row in reversed(rows)}  # the largest model of each method
    print("\nThe likeliest continuation of a prompt:")
    for row in reversed(ends.values()):
        print(f"\n--- {row['name']}\n{result['prompt']}{row['text'].rstrip()}")
    print(f"\n{result['seconds']:.0f} s. In {out}: the models, {PICTURE}, {RECORD}. Go on with:")
    print(f'  lordjax generate {out}/{rows[-1]["name"]} "def quicksort(items):"')
    print(f"  lordjax inspect {out}/{rows[-1]['name']}")
    print("  lordjax compress MODEL OUT --keep 0.8   (MODEL: a directory, a GGUF file or a hub id)")


def _show_table(rows: list[dict[str, Any]], original: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    protocol = rows[0]["protocol"]
    windows = f"{protocol['windows']} windows of {protocol['window']} tokens"
    print(
        "\nSmolLM2-135M-Instruct on Python's standard library: calibrated on modules a-m, measured"
    )
    print(f"on {windows} of modules n-z, in float32 with the weights on disk\n")
    table = Table("model")
    names = ("weights\non disk", "bits per\nblock weight", "perplexity", "decoding\ntokens/s")
    for name in (*names, "made\nin"):
        table.add_column(name, justify="right")
    table.add_row("GGUF file", format_bytes(original["bytes"]), "", "as dense", "as dense", "")
    for row in rows:
        figures = (
            format_bytes(row["bytes"]),
            f"{row['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
        )
        speed, seconds = f"{row['tokens_per_second']:.1f}", f"{row['seconds']:.0f} s"
        table.add_row(row["name"], *figures, speed, seconds)
    Console().print(table)
    print("GGUF file:     the download, quantized to 4 bits by llama.cpp")
    print("dense:         the same weights as numbers; all models below are made from it")
    print(
        "modegpt-SHARE: pruned MLPs and low-rank attention; this share of the block weights stays"
    )
    print("auto-BITS:     quantized weights and low-rank terms; bits per weight of the blocks")
    print("made in:       seconds of calibration (shared by a method's models) and of compression")
