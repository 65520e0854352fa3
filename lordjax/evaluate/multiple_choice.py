"""Multiple choice: of each question's choices the likeliest is taken.

``acc`` compares log-likelihoods as they are, ``acc_norm`` divides them by a choice's characters and
``acc_bytes`` by its UTF-8 bytes; of equal ones the first counts. Standard errors are those of a
mean of independent questions, with n - 1. All of it as in the LM evaluation harness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lordjax.evaluate.choice_tasks import TASKS, Question, QuestionSet
from lordjax.evaluate.likelihood import BATCH, Pair, log_likelihoods
from lordjax.models.config import ModelConfig
from lordjax.runtime.progress import Progress

LENGTHS = {  # what a score is divided by
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
    """Measures a model, dense or compressed, on questions with choices.

    Args:
      config: of a causal model.
      params: its parameters; leaves may be kernels of any kind.
      tokenizer: the model's.
      questions: of one set.
      batch_size: rows of a forward pass; does not change the result beyond rounding.
      max_length: most tokens the model reads; None: its longest sequence.
      progress: as of `likelihood.log_likelihoods`.

    Returns:
      ``metrics`` (each with its ``value`` and ``stderr``, None of a single question), ``rows`` (a
      record per question) and ``protocol``.

    Raises:
      ValueError: as `likelihood.log_likelihoods`.
    """
    asked = questions.questions
    pairs = [encode_pair(tokenizer, *pair) for question in asked for pair in question.pairs]
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
    """The number of the choice that a metric takes; keys of `LENGTHS`."""
    lengths = np.array([LENGTHS[metric](choice) for choice in choices], np.float64)
    return int(np.argmax(np.asarray(scores) / lengths))


def _mean(values: list[bool]) -> dict[str, float | None]:
    numbers = np.asarray(values, np.float64)
    error = float(numbers.std(ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else None
    return {"value": float(numbers.mean()), "stderr": error}


def encode(tokenizer: Any, text: str, *, special: bool | None = None) -> list[int]:
    """The ids of a text, with the special tokens that the tokenizer adds.

    ``special`` says whether they are added; None: as the tokenizer does, but not to a text that
    begins with the token that begins sequences.
    """
    first = tokenizer.bos_token or tokenizer.eos_token
    if special is None and first and text.startswith(first):
        special = False
    how = {} if special is None else {"add_special_tokens": special}
    return list(tokenizer.encode(text, **how))


def encode_pair(tokenizer: Any, context: str, continuation: str) -> Pair:
    """The ids of a context and of its continuation, encoded as one text.

    White space at the context's end goes to the continuation, as tokens begin with it. Instead of
    an empty context stands the token that begins (else ends) sequences.

    Raises:
      ValueError: if the context is empty and there is no such token.

    Source of the protocol: the LM evaluation harness, whose numbers are the published ones.
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
    """The token that begins (else ends) sequences.

    Raises:
      ValueError: if the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("an empty context, and the tokenizer has no BOS or EOS token to begin with")
