"""``lordjax demo``: a small model, compressed to several sizes on a laptop, measured and compared.

SmolLM2-135M-Instruct (Apache-2.0) comes inside a wheel of PyPI, so that no other service is
needed. It is calibrated on the modules a-m of Python's standard library and measured on modules n-z
that the calibration has not seen.

::

    OUT/dense, OUT/modegpt-0.8, OUT/auto-4.1 …   the models, directories that every verb opens
    OUT/picture.png                              perplexity against bytes and against speed
    OUT/demo.json                                settings and rows of the table

A model that is there is not made again, and a row that is there is not measured again, so that a
demo that was interrupted goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.scripts.console import check_output, format_bytes, progress_report, say
from lordjax.scripts.demo_model import WHEEL, corpora, fetch_model
from lordjax.scripts.opened_model import Model, file_bytes, open_model

if TYPE_CHECKING:
    from lordjax.compression.result import Result
    from lordjax.runtime.progress import Progress

MODEL_BYTES = 270_000_000  # on disk, of the dense one
DENSE, CODES = "dense", "auto"
RECORD, PICTURE = "demo.json", "picture.png"
PROMPT = 'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n'
NEW = 32  # tokens that continue it
REPEATS = 2  # timed runs, of which the faster counts


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model that the demo makes.

    Attributes:
      method: `DENSE`, or a method's name.
      budget: share of the block linear weights that stays, or bits per weight; None of `DENSE`.
    """

    method: str
    budget: float | None = None

    @property
    def name(self) -> str:
        """Of its directory."""
        return self.method if self.budget is None else f"{self.method}-{self.budget:g}"


def run_demo(
    out: str, keeps: tuple[float, ...], bits: tuple[float, ...], samples: int, windows: int
) -> dict[str, Any]:
    """Downloads a model, compresses it to every budget, measures and draws what came of it.

    Args:
      out: directory for everything; new, empty, or left by a demo with the same settings.
      keeps: budgets of the default method, shares of the block linear weights.
      bits: budgets of method ``auto``, bits per block weight.
      samples: calibration windows.
      windows: evaluation windows.

    Raises:
      FileExistsError: if ``out`` holds something else.
      OSError: if the model cannot be downloaded, or there is not enough room.
      ValueError: if ``out`` was begun with other settings.
    """
    from lordjax.methods import DEFAULT_METHOD
    from lordjax.storage.atomic_directory import check_room

    start, directory = time.perf_counter(), Path(out).expanduser()
    variants = [Variant(DENSE)]
    for method, budgets in ((DEFAULT_METHOD, keeps), (CODES, bits)):
        variants += [Variant(method, budget) for budget in sorted(set(budgets), reverse=True)]
    settings = {"model": WHEEL, "samples": samples, "windows": windows}
    rows = finished_rows(directory, settings)
    todo = [variant for variant in variants if not (directory / variant.name).exists()]
    check_room(directory, len(todo) * MODEL_BYTES)
    model = open_model(str(fetch_model()))
    calibration, evaluation = corpora(model, samples, windows)
    write_record(directory, settings, rows)
    try:
        make(model, calibration, todo, directory)
        for variant in variants:
            if variant.name not in rows:
                rows[variant.name] = measured(variant, directory, evaluation)
                write_record(directory, settings, rows)
    except KeyboardInterrupt:
        say(f"\nwhat is finished stays in {directory}; the same command goes on with the rest")
        raise
    shown = [rows[variant.name] for variant in variants]
    draw_rows(shown, directory / PICTURE)
    return {
        "output": str(directory),
        "original": {"file": model.path.name, "bytes": file_bytes(model.path)},
        "rows": shown,
        "prompt": PROMPT,
        "settings": settings,
        "seconds": time.perf_counter() - start,
    }


def finished_rows(directory: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by name that an earlier demo with these settings measured.

    Raises:
      FileExistsError: if something else is there.
      ValueError: if it had other settings, or its record is damaged.
    """
    file = directory / RECORD
    if not file.exists():
        check_output(directory)
        return {}
    advice = f"give another --out, or remove {directory} to start over"
    try:
        found = json.loads(file.read_text())
        before, rows = found["settings"], found["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the record of a demo ({error!r}); {advice}") from error
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        differences = ", ".join(f"{n} was {before.get(n)}, is {settings[n]}" for n in changed)
        raise ValueError(
            f"{directory}: a demo began here with other settings ({differences}); {advice}"
        )
    say(f"going on in {directory}: what is finished there is not done again")
    return rows


def write_record(directory: Path, settings: dict[str, Any], rows: dict[str, Any]) -> None:
    """Writes settings and rows, all or nothing."""
    from lordjax.storage.tensor_files import write_json

    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD, {"settings": settings, "rows": rows})


def make(model: Model, calibration: Any, variants: list[Variant], directory: Path) -> None:
    """Writes a directory for every variant; a method prepares once for all of its budgets."""
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
    """Parameters, plan and report of models of one method, and the seconds that each takes alone.

    They are computed in float32 and rounded to the dtype that the model is stored in.
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
    """What compresses the model to a budget; all that budgets share is done."""
    from lordjax.compression.low_rank import prepare
    from lordjax.compression.quantized import prepare_quantized

    dtype = model.stored_dtype
    if method != CODES:
        factored = prepare(model.source, calibration, method=method, progress=progress)
        return lambda keep: factored.compress(keep, dtype=dtype)
    quantizer = prepare_quantized(
        model.source, calibration, method=method, dtype=dtype, progress=progress
    )
    _ = quantizer.tables  # what every choice would cost, found when first asked for
    return lambda bits: quantizer.compress(bits=bits)


def measured(variant: Variant, directory: Path, evaluation: Any) -> dict[str, Any]:
    """A row of the table: bytes on disk, perplexity, speed, and how the prompt goes on.

    The weights are those on disk; products and activations are float32.
    """
    import jax

    from lordjax.evaluate import perplexity
    from lordjax.generation.completion import end_tokens, tokenize
    from lordjax.kernels.kinds import astype
    from lordjax.scripts.verbs.inspect import inspect_model
    from lordjax.storage.saved_model import open_saved

    path = directory / variant.name
    say(f"measuring {path} on {len(evaluation)} windows of {evaluation.shape[1]} tokens")
    opened = open_model(str(path))
    params, tokenizer = astype(opened.arrays(), "float32"), opened.tokenizer()
    with progress_report() as progress:
        found = perplexity(
            opened.config, params, evaluation, tokenizer_name=WHEEL, progress=progress
        )
    tokens, speed = decoded(opened.config, params, tokenize(tokenizer, PROMPT))
    ends = [tokens.index(end) for end in end_tokens(tokenizer) if end in tokens]
    linear = inspect_model(str(path))["block_linear"]
    jax.clear_caches()  # programs of other shapes are no use to the next model
    return {
        "name": variant.name,
        **dataclasses.asdict(variant),
        "kept": linear["kept"],
        "bits_per_weight": linear["bits_per_weight"],
        "bytes": file_bytes(path),
        "perplexity": found["perplexity"],
        "tokens_per_second": speed,
        "seconds": open_saved(path).report()["demo_seconds"],
        "text": tokenizer.decode(tokens[: min(ends, default=NEW)]),
        "protocol": found["protocol"],
    }


def decoded(config: Any, params: Any, prompt: list[int]) -> tuple[list[int], float]:
    """The likeliest `NEW` tokens behind a prompt, and how many a second follow the first.

    A first run compiles and is not timed; of the others the fastest counts.
    """
    from lordjax.generation.decode import stream

    tokens: list[int] = []
    speeds = []
    for _ in range(1 + REPEATS):
        chunks = stream(config, params, [prompt], max_new_tokens=NEW)
        first = next(chunks)
        start = time.perf_counter()
        rows = [first, *chunks]
        speeds.append((NEW - 1) / (time.perf_counter() - start))
        tokens = [int(token) for row in rows for token in row[0]]
    return tokens[:NEW], max(speeds[1:])


def draw_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against bytes on disk and against speed."""
    from lordjax.scripts.verbs.benchmark import draw

    points = [
        {"model": row["name"], "decode": {"1": row["tokens_per_second"]}} | row for row in rows
    ]
    draw(points, path)


def show(result: dict[str, Any]) -> None:
    """Prints the table, what the models write, and how to go on."""
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
