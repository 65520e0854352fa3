"""``lordjax evaluate-choices``: measures accuracy on multiple-choice tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lordjax.scripts.console import check_file, progress_report, write_rows
from lordjax.scripts.opened_model import open_model

SUFFIXES = (".jsonl", ".jsonl.gz")


def evaluate_choices(
    model: str,
    *,
    data: str,
    tasks: tuple[str, ...],
    limit: int | None,
    batch: int,
    max_length: int | None,
    out: str | None,
) -> dict[str, Any]:
    """Measures a model on one or more tasks; arguments are the flags."""
    settings = dict(locals())
    from lordjax.evaluate.choice_tasks import read_questions

    for name, value in {"--limit": limit, "--batch": batch}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}; expected 1 or more")
    if out is not None:
        check_file(out)
    sets = [read_questions(path, task) for task, path in located(data, tasks).items()]
    sets = [found if limit is None else found.first(limit) for found in sets]
    start = time.perf_counter()
    from lordjax.evaluate import multiple_choice

    opened = open_model(model)
    tokenizer, params = opened.tokenizer(), opened.arrays()
    results, rows = [], []
    for found in sets:
        with progress_report() as progress:
            how = {"batch_size": batch, "max_length": max_length, "progress": progress}
            result = multiple_choice.evaluate(opened.config, params, tokenizer, found, **how)
        rows += [{"task": found.task, **row} for row in result.pop("rows")]
        results.append({"task": found.task, **result})
    if out is not None:
        write_rows(Path(out).expanduser(), rows)
    seconds = time.perf_counter() - start
    return {"sets": results, "seconds": seconds, "output": out, "settings": settings}


def located(data: str, tasks: tuple[str, ...]) -> dict[str, Path]:
    """Returns task -> file of its questions.

    Args:
      data: a file, or a directory of files that are named after their tasks.
      tasks: tasks that were asked for; empty: as the names of the files say.

    Raises:
      FileNotFoundError: if there is no such path, or a task has no file in the directory.
      ValueError: if the task of a file is unknown, or two files have the same task.
    """
    from lordjax.evaluate.choice_tasks import TASKS, task_from_name

    known, path = ", ".join(TASKS), Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{data}: no such file or directory (--data)")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--task {task}: no such task; expected one of {known}")
    if path.is_file():
        named = task_from_name(path)
        if len(tasks) > 1 or not (tasks or named):
            raise ValueError(f"{data}: name its task with --task, one of {known}")
        return {(tasks or (str(named),))[0]: path}
    found: dict[str, Path] = {}
    for file in sorted(f for f in path.iterdir() if f.name.endswith(SUFFIXES)):
        task = task_from_name(file)
        if task is None or (tasks and task not in tasks):
            continue
        if task in found:
            raise ValueError(
                f"{found[task]} and {file.name}: two files of task {task}; expected one"
            )
        found[task] = file
    if missing := [task for task in tasks if task not in found]:
        raise FileNotFoundError(f"{data}: has no file {missing[0]}.jsonl or {missing[0]}.jsonl.gz")
    if not found:
        raise FileNotFoundError(
            f"{data}: has no .jsonl file that is named after a task; known tasks: {known}"
        )
    return found


def show(result: dict[str, Any]) -> None:
    """Prints the measurement for people."""
    for found in result["sets"]:
        values = "  ".join(
            f"{name} {m['value']:.4f}" + ("" if m["stderr"] is None else f" ± {m['stderr']:.4f}")
            for name, m in found["metrics"].items()
        )
        protocol = found["protocol"]
        notes = [f"{protocol['questions']} questions", *protocol["notes"]]
        if protocol["truncated"]:
            notes.append(f"{protocol['truncated']} choices were truncated at their beginning")
        print(f"{found['task']:14} {values}  ({'; '.join(notes)})")
    print(f"{'time':14} {result['seconds']:.1f} s")
    if result["output"]:
        print(f"{'output':14} {result['output']}")
