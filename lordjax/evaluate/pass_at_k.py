"""Functional correctness of programs that a model writes: pass@k.

A completion passes if prompt + completion + tests, as one program, run to the end in a `sandbox`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from lordjax.evaluate import sandbox
from lordjax.evaluate.code_problems import Problem, ProblemSet
from lordjax.evaluate.sandbox import Limits, Result
from lordjax.runtime.progress import Progress

Complete = Callable[[list[str]], list[str]]  # prompts -> one completion each


def truncate(completion: str, stops: Sequence[str]) -> str:
    """The completion up to the first of the stop strings."""
    found = [completion.find(stop) for stop in stops]
    return completion[: min((i for i in found if i >= 0), default=len(completion))]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k samples is right, estimated from c right ones of n.

    That is ``1 - C(n - c, k) / C(n, k)``, which has no bias. It is computed as a product of k
    factors, since binomials overflow.

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Completes prompts and runs what comes of them.

    Args:
      problems: what is asked.
      complete: called once, with every prompt as often in a row as there are samples.
      samples: completions of every prompt.
      ks: of pass@k, each at most ``samples``.
      limits: of every program; None: `Limits`.
      workers: programs that run at one time; see `sandbox.run_all`.
      allow_execution: must be True, since programs that nobody has read are run.
      progress: called with ("run", programs done, programs in all).

    Returns:
      As `judge`; ``protocol`` has the stop strings.

    Raises:
      PermissionError: without ``allow_execution``, before anything is generated.
      ValueError: if k is larger than ``samples``, a limit lets nothing run, or the number of
        completions is not that of the prompts.
      OSError: if the sandbox cannot be set up.
    """
    _check(samples, ks, allow_execution)
    # Generation takes hours, so what would stop it all is tried before.
    if (empty := sandbox.run("", limits)).outcome != sandbox.PASSED:
        raise ValueError(f"an empty program does not pass ({empty.error}); are limits too small?")
    prompts = [problem.prompt for problem in problems.problems for _ in range(samples)]
    completions = complete(prompts)
    if len(completions) != len(prompts):
        raise ValueError(f"{len(completions)} completions of {len(prompts)} prompts")
    texts = [truncate(completion, problems.stops) for completion in completions]
    rows = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    result = judge(
        problems,
        rows,
        ks=ks,
        limits=limits,
        workers=workers,
        allow_execution=allow_execution,
        progress=progress,
    )
    result["protocol"]["stop_strings"] = list(problems.stops)
    return result


def judge(
    problems: ProblemSet,
    completions: Sequence[Sequence[str]],
    *,
    ks: Sequence[int] = (1,),
    limits: Limits | None = None,
    workers: int | None = None,
    allow_execution: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs completions that are there already, as they are.

    Args:
      problems: what was asked.
      completions: of every problem, equally many each.
      ks: of pass@k, each at most the completions of a problem.
      limits: as for `evaluate`.
      workers: likewise.
      allow_execution: likewise.
      progress: likewise.

    Returns:
      ``pass_at`` (k -> mean over problems), ``tasks`` (their number), ``rows`` (of each problem
      ``task_id``, ``n``, ``correct`` and ``samples``: completion, outcome, error, seconds) and
      ``protocol``.

    Raises:
      PermissionError, ValueError, OSError: as `evaluate`.
    """
    counts = {len(texts) for texts in completions}
    if len(completions) != len(problems.problems) or len(counts) != 1:
        raise ValueError(
            f"completions of {len(completions)} problems, {sorted(counts)} each; expected those of "
            f"{len(problems.problems)} problems, as many of one as of another"
        )
    samples = counts.pop()
    _check(samples, ks, allow_execution)
    pairs = [
        (p, text) for p, texts in zip(problems.problems, completions, strict=True) for text in texts
    ]
    limits = limits or Limits()
    results = sandbox.run_all(
        [problem.program(text) for problem, text in pairs],
        limits,
        workers=workers,
        progress=progress,
    )
    rows = [
        _row(problem, texts, results[i * samples : (i + 1) * samples])
        for i, (problem, texts) in enumerate(zip(problems.problems, completions, strict=True))
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


def _check(samples: int, ks: Sequence[int], allow_execution: bool) -> None:
    if not allow_execution:
        raise PermissionError(
            "this runs programs that a model wrote and nobody has read; say allow_execution=True "
            "(--run-generated-code) where that is acceptable, in a container at best"
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
    """What was in force for all; where it changed on the way, every value."""
    pairs = sorted({pair for result in results for pair in result.isolation.items()})
    return {key: ", ".join(v for k, v in pairs if k == key) for key, _ in pairs}
