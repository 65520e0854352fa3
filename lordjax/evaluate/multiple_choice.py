"""Multiple-choice accuracy: the model's answer is the likeliest choice.

``acc`` compares the log-likelihoods, ``acc_norm`` divides them by the choice's number of
characters, and ``acc_bytes`` by its number of UTF-8 bytes. On a tie, the first choice wins. The
standard error is that of a mean over independent questions, with n - 1. All follow the LM
evaluation harness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lordjax.evaluate.choice_tasks import TASKS, Question, QuestionSet
from lordjax.evaluate.likelihood import BATCH, Pair, log_likelihoods
from lordjax.generation.completion import encode
from lordjax.models.config import ModelConfig
from lordjax.runtime.progress import Progress

LENGTHS = {  # divisors of the log-likelihood, by metric
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}


def evaluate(
    config: ModelConfig,
    params: Any,
    tokenizer: Any,
    questions: QuestionSet,
    *,
    batch_size: int = BATCH,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model, dense or compressed, on multiple-choice questions.

    Args:
      config: architecture of a causal model.
      params: the model's parameters; leaves may be kernels of any kind.
      tokenizer: the model's tokenizer.
      questions: the questions of one task.
      batch_size: rows of a forward pass; changes the result only by rounding.
      max_length: largest number of tokens the model reads; None: its longest sequence.
      progress: called with ("score", rows done, number of rows).

    Returns:
      ``metrics`` (``value`` and ``stderr`` of each; the latter is None for a single question),
      ``rows`` (one record per question) and ``protocol``.

    Raises:
      ValueError: as `likelihood.log_likelihoods`.
    """
    asked = questions.questions
    pairs = [tokenize_pair(tokenizer, *pair) for question in asked for pair in question.pairs]
    how = {"batch_size": batch_size, "max_length": max_length, "progress": progress}
    scores = log_likelihoods(config, params, pairs, **how)
    rows, start = [], 0
    for question in asked:
        end = start + len(question.pairs)
        rows.append(_row(question, [score.log_likelihood for score in scores[start:end]]))
        start = end
    names = list(LENGTHS) if TASKS[questions.task].normalised else ["acc"]
    most = max_length or config.max_positions
    return {
        "metrics": {name: _mean([row["right"][name] for row in rows]) for name in names},
        "rows": rows,
        "protocol": {
            "task": questions.task,
            "questions": len(asked),
            "shots": 0,
            "sha256": questions.sha256,
            "max_length": most,
            "truncated": sum(len(context) + len(rest) > most + 1 for context, rest in pairs),
            "matmul_precision": "highest",
            "notes": list(questions.notes),
        },
    }


def _row(question: Question, scores: list[float]) -> dict[str, Any]:
    picked = {name: pick(scores, question.choices, name) for name in LENGTHS}
    return {
        "where": question.where,
        "context": question.pairs[0][0],
        "choices": list(question.choices),
        "log_likelihoods": scores,
        "answer": question.answer,
        "picked": picked,
        "right": {name: number == question.answer for name, number in picked.items()},
    }


def pick(scores: list[float], choices: tuple[str, ...], metric: str) -> int:
    """Returns the index of the choice with the best score by a metric, a key of `LENGTHS`."""
    lengths = np.array([LENGTHS[metric](choice) for choice in choices], np.float64)
    return int(np.argmax(np.asarray(scores) / lengths))


def _mean(values: list[bool]) -> dict[str, float | None]:
    numbers = np.asarray(values, np.float64)
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else None
    return {"value": float(numbers.mean()), "stderr": error}


def tokenize_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Returns the token ids of a context and of its continuation, tokenized as one text.

    White space at the end of the context is moved to the continuation, because tokens begin with
    it. An empty context is replaced by the BOS token (EOS, if there is no BOS).

    Raises:
      ValueError: if the context is empty and the tokenizer has neither BOS nor EOS.

    Source: the protocol of the LM evaluation harness, which published numbers use.
    """
    kept = context.rstrip()
    if not context:
        first = prefix_token(tokenizer)
        ids = encode(tokenizer, continuation, special=False)
        return ([first], ids) if ids[:1] != [first] else (ids[:1], ids[1:])
    whole = encode(tokenizer, context + continuation)
    start = encode(tokenizer, kept)
    return start, whole[len(start) :]


def prefix_token(tokenizer: Any) -> int:
    """Returns the id of the BOS token; that of EOS if there is no BOS.

    Raises:
      ValueError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError(
        "an empty context, and the tokenizer has no BOS or EOS token to replace it; give a context"
    )
