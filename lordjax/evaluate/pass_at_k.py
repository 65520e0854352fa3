"""Functional correctness of generated programs: pass@k.

A completion passes if the tests of its problem run to their end. They call the program of prompt
and completion, which runs in the `sandbox`, from another process.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lordjax.evaluate import chat_answers, sandbox
from lordjax.evaluate.code_problems import Problem, ProblemSet
from lordjax.evaluate.sandbox import Limits, Result
from lordjax.runtime.progress import Progress

Complete = Callable[[list[str]], list[str]]  # prompts -> one completion each


def truncate(completion: str, stops: Sequence[str]) -> str:
    """Returns a completion up to the first stop string in it."""
    found = [completion.find(stop) for stop in stops]
    return completion[: min((i for i in found if i >= 0), default=len(completion))]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimates the probability that at least one of k samples is right.

    The estimate is ``1 - C(n - c, k) / C(n, k)``, which is unbiased. It is computed as a product
    of k factors, because binomials overflow.

    Args:
      n: number of samples.
      c: number of right samples among them.
      k: number of samples that are drawn.

    Raises:
      ValueError: unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.

    Source: arXiv 2107.03374, equation 1.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} samples, {c} right; expected 0 ≤ c ≤ n and 1 ≤ k ≤ n")
    return 1.0 - math.prod(max(n - c - i, 0) / (n - i) for i in range(k))


def evaluate(
    problems: ProblemSet,
    complete: Complete,
    *,
    samples: int = 1,
    ks: Sequence[int] = (1,),
    limits: Limits | None = None,
    workers: int | None = None,
    allow_execution: bool = False,
    allow_weak_isolation: bool = False,
    chat: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Generates completions of problems, and runs them.

    Args:
      problems: the problems.
      complete: function from prompts to completions; called once, with every prompt ``samples``
        times in a row.
      samples: completions per prompt.
      ks: values of k for pass@k, each at most ``samples``.
      limits: limits of every program; None: the defaults of `Limits`.
      workers: number of programs that run at the same time; see `sandbox.run_all`.
      allow_execution: must be True, because programs are run that nobody has read.
      allow_weak_isolation: whether they run where a hostile program finds a way out; see `sandbox`.
      chat: whether the prompts are questions to a chat model, whose answers hold the programs; see
        `chat_answers`. Stop strings are not used then.
      progress: called with ("run", programs done, number of programs).

    Returns:
      The results of `judge`; ``protocol`` also has the stop strings and ``chat``.

    Raises:
      PermissionError: unless execution, and isolation as it is, are allowed; nothing is generated.
      ValueError: if k is larger than ``samples``, no program can run within the limits, or
        ``complete`` returns another number of completions than prompts.
      OSError: if the sandbox cannot be set up.
    """
    _check(samples, ks, allow_execution)
    # Generation may take hours, so test the sandbox first.
    if (empty := sandbox.run("", limits, weak=allow_weak_isolation)).outcome != sandbox.PASSED:
        raise ValueError(f"an empty program does not pass ({empty.error}); are limits too small?")
    asked = [problem for problem in problems.problems for _ in range(samples)]
    prompts = [chat_answers.question(p) if chat else p.prompt for p in asked]
    completions = complete(prompts)
    if len(completions) != len(prompts):
        raise ValueError(
            f"{len(completions)} completions of {len(prompts)} prompts; expected one each"
        )
    stops = () if chat else problems.stops
    if chat:
        texts = list(map(chat_answers.completion, asked, completions))
    else:
        texts = [truncate(completion, stops) for completion in completions]
    rows = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    how: dict[str, Any] = {"ks": ks, "limits": limits, "workers": workers, "progress": progress}
    how |= {"allow_execution": allow_execution, "allow_weak_isolation": allow_weak_isolation}
    result = judge(problems, rows, **how)
    result["protocol"] |= {"stop_strings": list(stops), "chat": chat}
    return result


def judge(
    problems: ProblemSet,
    completions: Sequence[Sequence[str]],
    *,
    ks: Sequence[int] = (1,),
    limits: Limits | None = None,
    workers: int | None = None,
    allow_execution: bool = False,
    allow_weak_isolation: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs given completions, which are not truncated.

    Args:
      problems: the problems.
      completions: the completions of every problem, equally many each.
      ks: values of k for pass@k, each at most the number of completions per problem.
      limits: as for `evaluate`.
      workers: as for `evaluate`.
      allow_execution: as for `evaluate`.
      allow_weak_isolation: as for `evaluate`.
      progress: as for `evaluate`.

    Returns:
      ``pass_at`` (the mean over problems, by k), ``tasks`` (number of problems), ``rows`` (for each
      problem ``task_id``, ``n``, ``correct`` and ``samples``: completion, outcome, error, seconds)
      and ``protocol``.

    Raises:
      PermissionError, ValueError, OSError: as `evaluate`.
    """
    samples = _samples_each(problems, completions)
    _check(samples, ks, allow_execution)
    limits = limits or Limits()
    answers = list(zip(problems.problems, completions, strict=True))
    programs = [problem.program(text) for problem, texts in answers for text in texts]
    checks = [problem.checks() for problem, texts in answers for _ in texts]
    how: dict[str, Any] = {"workers": workers, "weak": allow_weak_isolation, "progress": progress}
    results = sandbox.run_all(programs, limits, checks=checks, **how)
    rows = [
        _row(problem, texts, results[i * samples : (i + 1) * samples])
        for i, (problem, texts) in enumerate(answers)
    ]
    right = [row["correct"] for row in rows]
    means = {k: math.fsum(pass_at_k(samples, c, k) for c in right) / len(right) for k in ks}
    return {
        "pass_at": means,
        "tasks": len(rows),
        "rows": rows,
        "protocol": {
            "set": problems.name,
            "data_sha256": problems.sha256,
            "samples": samples,
            "limits": dataclasses.asdict(limits),
            "isolation": _isolation(results),
        },
    }


def _samples_each(problems: ProblemSet, completions: Sequence[Sequence[str]]) -> int:
    """Returns the number of completions per problem; raises ValueError if they differ."""
    counts = {len(texts) for texts in completions}
    if len(completions) != len(problems.problems) or len(counts) != 1:
        raise ValueError(
            f"completions of {len(completions)} problems, {sorted(counts)} each; expected those of "
            f"{len(problems.problems)} problems, equally many each"
        )
    return counts.pop()


def _check(samples: int, ks: Sequence[int], allow_execution: bool) -> None:
    """Raises PermissionError without ``allow_execution``, and ValueError if a k is out of range."""
    if not allow_execution:
        raise PermissionError(
            "this runs programs that a model wrote and nobody has read; pass allow_execution=True "
            "(--run-generated-code) where that is acceptable, preferably in a container"
        )
    if not ks or not all(1 <= k <= samples for k in ks):
        raise ValueError(f"pass@k of k {list(ks)} with {samples} samples; expected 1 ≤ k ≤ samples")


def _row(problem: Problem, texts: Sequence[str], results: list[Result]) -> dict[str, Any]:
    samples = [
        {"completion": t, "outcome": r.outcome, "error": r.error, "seconds": round(r.seconds, 4)}
        for t, r in zip(texts, results, strict=True)
    ]
    correct = sum(result.outcome == sandbox.PASSED for result in results)
    return {
        "task_id": problem.task_id,
        "n": len(samples),
        "correct": correct,
        "samples": samples,
    }


def _isolation(results: list[Result]) -> dict[str, str]:
    """Returns the isolation of all programs; where it differed, every value."""
    pairs = sorted({pair for result in results for pair in result.isolation.items()})
    return {key: ", ".join(v for k, v in pairs if k == key) for key, _ in pairs}
