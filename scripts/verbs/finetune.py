"""``lordjax finetune``: open, read examples, train, write; and ``lordjax merge``."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lordjax.scripts.console import check_output, format_bytes, say
from lordjax.scripts.opened_model import Model, open_model
from lordjax.scripts.token_inputs import window_length

TASKS = ("text", "instructions", "classes")
BY_SUFFIX = {".tsv": "classes", ".json": "instructions"}
CURVE = "loss.png"


def finetune_model(
    model: str,
    out: str,
    *,
    data: str,
    recipe: str,
    task: str | None,
    seq_len: int | None,
    validation: float,
    run: str | None,
    resume: bool,
    teacher: str | None,
    distill: float | None,
    devices: int | None,
    every: int,
    last: int,
    keep_adapters: bool,
    rank: int | None,
    **options: Any,
) -> dict[str, Any]:
    """Fine-tunes a model into a directory; arguments are the flags. Returns the summary."""
    start = time.perf_counter()
    from lordjax.data import examples
    from lordjax.evaluate.classification import classify
    from lordjax.finetune import adapters
    from lordjax.finetune.recipes import changed, named
    from lordjax.finetune.step import Settings
    from lordjax.finetune.training_run import METRICS, Keeping, train
    from lordjax.runtime.mesh import make_mesh
    from lordjax.storage import checkpoint

    directory = Path(out).expanduser()
    check_output(directory)
    row = changed(named(recipe), rank=rank, **options)
    if distill is not None and teacher is None:
        raise ValueError("--distill is the weight of a --teacher; name one")
    weight = (0.5 if distill is None else distill) if teacher else 0.0
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{k: v for k, v in options.items() if k in names}, distill=weight)
    settings.check()
    opened = open_model(model)
    found, config, params, hf_config = _task(opened, data, task, seq_len, validation, settings.seed)
    examples.check(config, found.train)
    about = {
        "model": _identity(opened),
        "recipe_name": recipe,
        "data": found.facts,
        "teacher": teacher,
    }
    folder = Path(run).expanduser() if run else directory.with_name(f"{directory.name}.run")
    with _progress(settings.steps) as report:
        trained = train(
            config,
            params,
            found,
            row,
            settings,
            folder,
            about=about,
            keeping=Keeping(every, last),
            resume=resume,
            teacher=_teacher(teacher, config),
            mesh=None if devices is None else make_mesh({"data": devices}),
            report=report,
        )
    new = trained.params if keep_adapters else adapters.merge(trained.params)
    summary = _summary(trained)
    if config.head == "classes" and found.validation.size:
        summary["scores"] = classify(config, new, found.validation)[1]
    picture = folder / CURVE
    draw(trained.history, picture)

    def beside(stage: Path) -> None:
        opened.write_tokenizer(stage)
        for path in (folder / METRICS, picture):
            shutil.copy(path, stage / path.name)

    everything = {
        **about,
        "settings": dataclasses.asdict(settings),
        "recipe": dataclasses.asdict(row),
    }
    report_json = {"finetune": {**everything, **summary}}
    checkpoint.save(
        directory, config, new, hf_config=hf_config, report=report_json, write_tokenizer=beside
    )
    return {
        "output": str(directory),
        "run": str(folder),
        **summary,
        "bytes": checkpoint.nbytes(new),
        "seconds": time.perf_counter() - start,
        "recipe": recipe,
    }


def _identity(opened: Model) -> dict[str, Any]:
    """What a resumed run must have in common: not the path alone, which may hold another model."""
    leaves = {path: list(leaf.shape) for path, leaf in opened.leaves().items()}
    files = [opened.path] if opened.path.is_file() else sorted(opened.path.glob("*.safetensors"))
    stats = [file.stat() for file in files]
    return {
        "name": opened.name,
        "arrays": len(leaves),
        "files": [[f.name, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)],
    }


def _teacher(name: str | None, config: Any) -> Any:
    if name is None:
        return None
    opened = open_model(name)
    if opened.config != config:
        raise ValueError(
            f"{name}: not of the architecture of the model that is trained; take the model that it "
            "was compressed from"
        )
    return opened.params()


def _task(
    opened: Model, path: str, task: str | None, seq_len: int | None, share: float, seed: int
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Examples, and the model with the head that they need."""
    import jax

    from lordjax.conversions.families.registry import with_labels
    from lordjax.data import classification, examples, instructions
    from lordjax.models.output_heads import with_classes

    task = task or BY_SUFFIX.get(Path(path).suffix, "text")
    config, params, hf_config = opened.config, opened.params(), opened.hf_config
    is_array = Path(path).suffix == ".npy"
    given = {
        "tokenizer": None if is_array else opened.tokenizer(),
        "seq_len": window_length(path, seq_len, config),
        "vocab_size": config.vocab_size,
        "share": share,
        "seed": seed,
    }
    if task != "classes" and config.head != "causal":
        raise ValueError(f"{opened.name}: head {config.head!r}; only classes can be trained")
    if task == "text":
        return examples.packed(path, **given), config, params, hf_config
    if task == "instructions":
        return instructions.instructions(path, **given), config, params, hf_config
    found = classification.classification(path, labels=_named_classes(config, hf_config), **given)
    labels = found.facts["labels"]
    if config.num_classes != len(labels):
        config, params = with_classes(config, params, len(labels), jax.random.key(seed))
    return found, config, params, with_labels(hf_config, labels)


def _named_classes(config: Any, hf_config: dict[str, Any]) -> list[str] | None:
    """The names that a classifier has for its classes; None: just numbers."""
    known = hf_config.get("id2label") if config.head == "classes" else None
    names = [] if known is None else [known[key] for key in sorted(known, key=int)]
    return None if all(name.startswith("LABEL_") for name in names) else names


def _summary(trained: Any) -> dict[str, Any]:
    """Nats at the start, at the end and at best; tokens and seconds of the steps."""
    held = [(line["step"], line["validation"]) for line in trained.history if "validation" in line]
    steps = [line for line in trained.history if "nll" in line]
    # The first step compiles.
    timed = [line for line in steps[1:] if line["seconds"] > 0]
    return {
        "steps": steps[-1]["step"],
        "best_step": trained.best,
        "validation_before": held[0][1] if held else None,
        "validation_after": dict(held).get(trained.best) if held else None,
        "targets": sum(line["targets"] for line in steps),
        "targets_per_second": sum(line["targets"] for line in timed)
        / max(sum(line["seconds"] for line in timed), 1e-9),
    }


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on a terminal; else a line for every measurement and every ten seconds."""
    seconds: list[float] = []
    last = [-10.0]

    def text(line: dict[str, Any]) -> str:
        from lordjax.runtime.progress import peak_rss

        if "validation" in line:
            return f"step {line['step']}: validation {line['validation']:.4f} nats"
        seconds.append(line["seconds"])
        pace = sum(seconds[-20:]) / len(seconds[-20:])
        left = time.strftime("%H:%M:%S", time.gmtime(pace * (steps - line["step"])))
        return (
            f"step {line['step']}/{steps}: loss {line['loss']:.4f}, "
            f"{line['targets'] / pace:.0f} tokens/s, {left} left, peak {format_bytes(peak_rss())}"
        )

    if not sys.stderr.isatty():

        def lines(line: dict[str, Any]) -> None:
            shown, now = text(line), time.monotonic()
            if "validation" in line or line["step"] == steps or now - last[0] >= 10:
                last[0] = now
                say(shown)

        yield lines
        return
    from rich import progress as rich
    from rich.console import Console

    columns = [rich.BarColumn(), rich.TextColumn("{task.description}")]
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("compiling", total=steps)

        def bar(line: dict[str, Any]) -> None:
            shown = text(line)
            if "validation" in line:
                bars.console.print(shown)
            else:
                bars.update(task, completed=line["step"], description=shown)

        yield bar


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """The curves of the loss as a picture."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, key in (("training", "nll"), ("validation", "validation")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if key != "nll" else None)
    axes.set(xlabel="step", ylabel="nats per target")
    axes.legend()
    figure.savefig(path, dpi=120)


def show(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    print(
        f"{result['output']}: {result['recipe']}, {result['steps']} steps, "
        f"{format_bytes(result['bytes'])}, {result['seconds']:.0f} s"
    )
    if result["validation_before"] is not None:
        print(
            f"validation: {result['validation_before']:.4f} nats per target before, "
            f"{result['validation_after']:.4f} after step {result['best_step']}"
        )
    if "scores" in result:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in result["scores"].items())
        print(f"of the held-out examples: {scores}")
    print(f"metrics, checkpoints and the curve of the loss: {result['run']}")
    print(f"next: lordjax evaluate {result['output']} --tokens PATH")


def merge_model(model: str, out: str, *, to: str) -> dict[str, Any]:
    """Folds adapters in; arguments are the flags. Returns the summary."""
    from lordjax.finetune import adapters
    from lordjax.kernels.base import materialize, nbytes
    from lordjax.kernels.kinds import astype
    from lordjax.storage import checkpoint

    directory = Path(out).expanduser()
    check_output(directory)
    opened = open_model(model)
    params = opened.params()
    new = adapters.merge(params) if to == "factors" else materialize(params)
    new = new if opened.stored_dtype is None else astype(new, opened.stored_dtype)
    checkpoint.save(
        directory,
        opened.config,
        new,
        hf_config=opened.hf_config,
        write_tokenizer=opened.write_tokenizer,
    )
    return {"output": str(directory), "bytes_before": nbytes(params), "bytes": nbytes(new)}


def show_merged(result: dict[str, Any]) -> None:
    """Prints the summary for people."""
    before, now = format_bytes(result["bytes_before"]), format_bytes(result["bytes"])
    print(f"{result['output']}: {before} before, {now} now")
