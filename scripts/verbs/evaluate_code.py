"""``lordjax evaluate-code``: measures pass@k of a model's programs on HumanEval or MBPP."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lordjax.scripts.console import check_file, progress_report, write_rows
from lordjax.scripts.opened_model import open_model

if TYPE_CHECKING:
    from lordjax.evaluate.pass_at_k import Complete
    from lordjax.runtime.progress import Progress

KS = (1, 10, 100)  # values of k of pass@k, as far as there are enough samples


def evaluate_code(
    model: str | None,
    *,
    problems: str,
    samples: int,
    temperature: float,
    top_p: float | None,
    max_new_tokens: int,
    seed: int,
    batch: int,
    seconds: float,
    workers: int | None,
    first: int | None,
    chat: bool,
    run_generated_code: bool,
    allow_weak_isolation: bool,
    out: str | None,
    reference: bool,
) -> dict[str, Any]:
    """Measures a model, or with ``reference`` the problems' own solutions; arguments are flags."""
    settings = dict(locals())
    from lordjax.evaluate import pass_at_k
    from lordjax.evaluate.code_problems import read_problems
    from lordjax.evaluate.sandbox import Limits

    _check(model, samples, temperature, batch, first, out, reference)
    found = read_problems(problems)
    found = found if first is None else found.first(first)
    how: dict[str, Any] = {
        "ks": [k for k in KS if k <= samples],
        "limits": Limits(seconds=seconds, cpu_seconds=seconds),
        "workers": workers,
        "allow_execution": run_generated_code,
        "allow_weak_isolation": allow_weak_isolation,
    }
    start = time.perf_counter()
    with progress_report() as progress:
        if reference:
            solutions = [[problem.solution] for problem in found.problems]
            result = pass_at_k.judge(found, solutions, progress=progress, **{**how, "ks": [1]})
        else:
            complete = _completer(settings, () if chat else found.stops, progress)
            how |= {"chat": chat, "progress": progress}
            result = pass_at_k.evaluate(found, complete, samples=samples, **how)
    rows = result.pop("rows")
    if out is not None:
        write_rows(Path(out).expanduser(), rows)
    tried = [sample["outcome"] for row in rows for sample in row["samples"]]
    if not reference:
        names = ("temperature", "top_p", "max_new_tokens", "seed", "batch")
        result["protocol"] |= {name: settings[name] for name in names}
    return {
        **result,
        "outcomes": dict(Counter(tried).most_common()),
        "unsolved": [row["task_id"] for row in rows if not row["correct"]],
        "seconds": time.perf_counter() - start,
        "output": out,
        "settings": settings,
    }


def _check(
    model: str | None,
    samples: int,
    temperature: float,
    batch: int,
    first: int | None,
    out: str | None,
    reference: bool,
) -> None:
    """Raises ValueError for wrong flags, before a model is opened."""
    if reference != (model is None):
        raise ValueError(
            "give either a MODEL or --reference, which runs the problems' own solutions"
        )
    for name, value in {"--samples": samples, "--batch": batch, "--first": first}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}; expected 1 or more")
    if not reference and samples > 1 and temperature <= 0:
        raise ValueError(
            f"{samples} samples at temperature {temperature:g} would all be the same; give "
            "--temperature above 0, or --samples 1"
        )
    if out is not None:
        check_file(out)


def _completer(settings: dict[str, Any], stops: tuple[str, ...], progress: Progress) -> Complete:
    """Returns a function that completes prompts in batches; it opens the model when called."""

    def complete(prompts: list[str]) -> list[str]:
        from lordjax.generation import completion
        from lordjax.generation.chat_turns import chat_ids
        from lordjax.generation.sampling import Sampling

        opened = open_model(settings["model"])
        if opened.config.head != "causal":
            raise ValueError(
                f"{settings['model']}: its head {opened.config.head!r} cannot generate text"
            )
        tokenizer, chat = opened.tokenizer(), settings["chat"]
        asked: list[Any] = prompts
        if chat:
            turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
            asked = [chat_ids(tokenizer, messages, opened.name) for messages in turns]
        found = completion.complete(
            opened.arrays(),
            opened.config,
            tokenizer,
            asked,
            max_new_tokens=settings["max_new_tokens"],
            sampling=Sampling(settings["temperature"], top_p=settings["top_p"]),
            stop_strings=stops,
            stop_tokens=opened.stop_tokens(tokenizer, chat=chat),
            seed=settings["seed"],
            batch_size=settings["batch"],
            progress=progress,
        )
        return [answer.text for answer in found]

    return complete


def show(result: dict[str, Any]) -> None:
    """Prints the measurement for people."""
    for k, value in result["pass_at"].items():
        print(f"{f'pass@{k}':16} {value:.4f}")
    counts = ", ".join(f"{count} {name}" for name, count in result["outcomes"].items())
    print(f"{'programs':16} {counts}; {result['tasks']} tasks, {result['seconds']:.1f} s")
    if result["output"]:
        print(f"{'output':16} {result['output']}")
    for name, value in result["protocol"].items():
        print(f"{name:16} {value}")
