"""``lordjax finetune``: reads examples, trains a model and writes it."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.kernels.base import nbytes
from lordjax.scripts.console import check_output, format_bytes, say
from lordjax.scripts.opened_model import Model, model_checksums, open_model, tokenizer_writer
from lordjax.scripts.token_inputs import window_length

if TYPE_CHECKING:
    from lordjax.finetune.step import Settings

TASKS = ("text", "instructions", "classes")
BY_SUFFIX = {".tsv": "classes", ".json": "instructions"}
CURVE = "loss.png"
DISTILL = 0.5  # weight of the teacher, unless --distill gives one


def finetune_model(
    model: str,
    out: str,
    *,
    data: str,
    recipe: str,
    task: str | None,
    field: str,
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
    from lordjax.finetune import adapters
    from lordjax.finetune.recipes import changed, named
    from lordjax.finetune.run_directory import RUN
    from lordjax.finetune.training_run import CheckpointPolicy, train
    from lordjax.kernels import trained_scales
    from lordjax.runtime import unfinished

    directory = Path(out).expanduser()
    check_output(directory)
    method = changed(named(recipe), rank=rank, **options)
    settings = _settings(options, teacher, distill)
    opened = open_model(model)
    reading = (data, task, field, seq_len, validation, settings.seed)
    found, config, params, hf_config = _task(opened, *reading)
    about = _about(opened, recipe, found, teacher)
    folder = Path(run).expanduser() if run else directory.with_name(f"{directory.name}.run")
    job = config, params, found, method, settings, folder
    how: dict[str, Any] = {"keeping": CheckpointPolicy(every, last), "mesh": _mesh(devices)}
    how |= {"resume": resume, "teacher": _teacher(teacher, config)}
    with unfinished.telling(f"the run is kept in {folder}", folder / RUN):
        with _progress(settings.steps) as report:
            trained = train(*job, about=about, report=report, **how)
        new = trained_scales.packed(trained.params, params)
        new = new if keep_adapters else adapters.merge(new)
        summary = _summary(trained) | _scores(config, new, found.validation)
        details = {"settings": dataclasses.asdict(settings), "recipe": dataclasses.asdict(method)}
        draw(trained.history, folder / CURVE)
        _save(directory, (config, new, hf_config), opened, folder, {**about, **details, **summary})
    return {
        "output": str(directory),
        "run": str(folder),
        **summary,
        "bytes": nbytes(new),
        "seconds": time.perf_counter() - start,
        "recipe": recipe,
    }


def _settings(options: dict[str, Any], teacher: str | None, distill: float | None) -> Settings:
    """The settings of training that the flags give.

    Raises:
      ValueError: if a setting is out of range, or ``--distill`` has no ``--teacher``.
    """
    from lordjax.finetune.step import Settings

    if distill is not None and teacher is None:
        raise ValueError("--distill is the weight of a --teacher; name one")
    weight = (DISTILL if distill is None else distill) if teacher else 0.0
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{k: v for k, v in options.items() if k in names}, distill=weight)
    settings.check()
    return settings


def _scores(config: Any, params: Any, validation: Any) -> dict[str, Any]:
    """Scores of a classifier on the held-out examples; empty if there are none."""
    from lordjax.evaluate.classification import classify

    if config.head != "classes" or not validation.size:
        return {}
    return {"scores": classify(config, params, validation)[1]}


def _save(
    directory: Path,
    model: tuple[Any, Any, dict[str, Any]],
    opened: Model,
    folder: Path,
    report: dict[str, Any],
) -> None:
    """Writes the trained model, with the tokenizer, the metrics and the loss curve of the run.

    Args:
      directory: where the model is written.
      model: its config, its parameters and its config in Hugging Face's format.
      opened: the model that was trained, whose tokenizer is copied.
      folder: directory of the run.
      report: content of ``report.json`` under ``finetune``.
    """
    from lordjax.finetune.training_run import METRICS
    from lordjax.storage import checkpoint

    def write_beside(stage: Path) -> None:
        tokenizer_writer(opened)(stage)
        for path in (folder / METRICS, folder / CURVE):
            shutil.copy(path, stage / path.name)

    config, params, hf_config = model
    checkpoint.save(
        directory,
        config,
        params,
        hf_config=hf_config,
        report={"finetune": report},
        write_tokenizer=write_beside,
    )


def _mesh(devices: int | None) -> Any:
    """A mesh of so many devices; None for one device."""
    from lordjax.runtime.mesh import make_mesh

    return None if devices is None else make_mesh({"data": devices})


def _about(opened: Model, recipe: str, found: Any, teacher: str | None) -> dict[str, Any]:
    """What a run is about: a resumed run must have the same."""
    return {
        "model": {"name": opened.name, "files": model_checksums(opened)},
        "recipe_name": recipe,
        "data": found.facts,
        "teacher": teacher,
    }


def _teacher(name: str | None, config: Any) -> Any:
    """Parameters of the teacher; None without one."""
    if name is None:
        return None
    opened = open_model(name)
    if opened.config != config:
        raise ValueError(
            f"--teacher {name}: has another architecture than the model that is trained; give the "
            "original model that it was compressed from"
        )
    return opened.params()


Task = tuple[Any, Any, Any, dict[str, Any]]  # examples; config, parameters and HF config of a model


def _task(opened: Model, *reading: Any) -> Task:
    """The examples, checked; and the model with the head that they need; see `_read_task`."""
    from lordjax.data import examples

    found, config, params, hf_config = _read_task(opened, *reading)
    examples.check(config, found.train)
    return found, config, params, hf_config


def _read_task(
    opened: Model, path: str, task: Any, field: str, seq_len: Any, share: float, seed: int
) -> Task:
    import jax

    from lordjax.conversions.families.registry import with_labels
    from lordjax.data import classification, examples, instructions
    from lordjax.models.output_heads import with_classes

    task = task or BY_SUFFIX.get(Path(path).suffix.lower(), "text")
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
        raise ValueError(
            f"{opened.name}: its head {config.head!r} can only be trained with --task classes"
        )
    if task == "text":
        return examples.packed(path, **given, field=field), config, params, hf_config
    if task == "instructions":
        return instructions.instructions(path, **given), config, params, hf_config
    found = classification.classification(path, labels=_named_classes(config, hf_config), **given)
    labels = found.facts["labels"]
    if config.head != "classes" or config.num_classes != len(labels):
        config, params = with_classes(config, params, len(labels), jax.random.key(seed))
    return found, config, params, with_labels(hf_config, labels)


def _named_classes(config: Any, hf_config: dict[str, Any]) -> list[str] | None:
    """The names of a classifier's classes; None if they are only numbers."""
    known = hf_config.get("id2label") if config.head == "classes" else None
    names = [] if known is None else [known[key] for key in sorted(known, key=int)]
    return None if all(name.startswith("LABEL_") for name in names) else names


def _summary(trained: Any) -> dict[str, Any]:
    """Validation loss before training and at the best step; targets per second."""
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
    """Progress on stderr: a bar on a terminal, else a line per validation and every 10 s."""
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
    """Draws the training and validation loss into a picture.

    Args:
      history: lines of the metrics file.
      path: where the picture is written; its suffix is the format.
    """
    from matplotlib.figure import Figure

    from lordjax.scripts.report.figures import save_figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, key in (("training", "nll"), ("validation", "validation")):
        points = [(line["step"], line[key]) for line in history if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if key != "nll" else None)
    axes.set(xlabel="step", ylabel="nats per target")
    axes.legend()
    save_figure(figure, path)


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
        print(f"scores on the held-out examples: {scores}")
    print(f"metrics, checkpoints and loss curve: {result['run']}")
    print(f"next: lordjax evaluate {result['output']} --tokens PATH")
