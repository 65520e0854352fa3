"""Multiple-choice tasks: ARC, BoolQ, HellaSwag, OpenBookQA, PIQA, Social IQa, WinoGrande.

Names and prompts are those of the LM evaluation harness, which published numbers use. Each line of
a file is a JSON object with the data set's own fields, or with ``question`` (text), ``choices``
(list of texts) and ``answer`` (number of the right choice, from 0).

A choice continues the question. WinoGrande uses partial scoring: the choice is inserted into the
sentence, and the rest of the sentence after it is scored.

Source of partial scoring: Trinh and Le, A simple method for commonsense reasoning (arXiv
1806.02847).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lordjax.data import record_files


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, as texts to score.

    Attributes:
      where: its file and line.
      pairs: a context and its continuation for every choice.
      choices: texts whose lengths normalize the scores.
      answer: number of the right choice, from 0.
    """

    where: str
    pairs: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """The questions of one file.

    Attributes:
      task: a key of `TASKS`.
      questions: the questions, in the order of the file.
      sha256: SHA-256 of the uncompressed file.
      notes: differences from the published data set.
    """

    task: str
    questions: tuple[Question, ...]
    sha256: str
    notes: tuple[str, ...] = ()

    def first(self, count: int) -> QuestionSet:
        """Returns a set of the first ``count`` questions."""
        return dataclasses.replace(self, questions=self.questions[:count])


class Fields(NamedTuple):
    """The fields of a record that prompts use.

    Attributes:
      question: the question, or the text that a choice continues.
      choices: the choices.
      answer: number of the right choice, from 0.
      passage: text that the question is about; None if there is none.
    """

    question: str
    choices: list[str]
    answer: int
    passage: str | None = None


class Record:
    """A JSON object of a file, whose readers raise errors that name file and line."""

    def __init__(self, where: str, values: dict[str, Any]):
        self.where, self._values = where, values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str) -> str:
        """Returns the text of a field."""
        if not isinstance(value := self._values.get(key), str):
            raise self.error(key, "text")
        return value

    def texts(self, *keys: str) -> list[str]:
        """Returns a list of texts, below one key or nested keys."""
        value: Any = self._values
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self.error(keys[0], "a list of texts" + (f' as "{keys[1]}"' if keys[1:] else ""))
        return value

    def label(self, key: str, labels: list[str]) -> int:
        """Returns the index of a field's value in ``labels``; the value may be number or text."""
        value = self._values.get(key)
        name = str(value).strip().lower()
        if value is None or name not in labels:
            raise self.error(key, f"one of {', '.join(labels)}")
        return labels.index(name)

    def error(self, key: str, expected: str) -> ValueError:
        """Returns a ValueError that names the field, its value and what was expected."""
        return ValueError(
            f'{self.where}: "{key}" is {self._values.get(key)!r}; expected {expected}'
        )


def _plain(record: Record) -> Fields:
    choices = record.texts("choices")
    labels = [str(i) for i in range(len(choices))]
    passage = record.text("passage") if "passage" in record else None
    return Fields(record.text("question"), choices, record.label("answer", labels), passage)


def _arc(record: Record, question: str = "question") -> Fields:
    choices, labels = record.texts("choices", "text"), record.texts("choices", "label")
    answer = record.label("answerKey", [label.lower() for label in labels])
    return Fields(record.text(question), choices, answer)


def _openbookqa(record: Record) -> Fields:
    return _arc(record, "question_stem")


def _piqa(record: Record) -> Fields:
    choices = [record.text("sol1"), record.text("sol2")]
    return Fields(record.text("goal"), choices, record.label("label", ["0", "1"]))


def _boolq(record: Record) -> Fields:
    if "label" in record:
        answer = record.label("label", ["0", "1"])
    else:
        answer = record.label("answer", ["false", "true"])
    return Fields(record.text("question"), ["no", "yes"], answer, record.text("passage"))


def _social_iqa(record: Record) -> Fields:
    choices = [record.text(f"answer{letter}") for letter in "ABC"]
    question = f"{record.text('context')} {record.text('question')}"
    return Fields(question, choices, record.label("label", ["1", "2", "3"]))


def _winogrande(record: Record) -> Fields:
    choices = [record.text("option1"), record.text("option2")]
    return Fields(record.text("sentence"), choices, record.label("answer", ["1", "2"]))


def _hellaswag(record: Record) -> Fields:
    endings = record.texts("endings")
    context = f"{record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
    answer = record.label("label", [str(i) for i in range(len(endings))])
    return Fields(f"{record.text('activity_label')}: {context}", endings, answer)


Prompts = tuple[list[tuple[str, str]], list[str]]  # `Question.pairs` and `Question.choices`


def _template(template: str) -> Callable[[Fields], Prompts]:
    """Returns a function that puts each choice after a prompt and a space."""

    def prompts(fields: Fields) -> Prompts:
        context = template.format(fields.question)
        return [(context, f" {choice}") for choice in fields.choices], fields.choices

    return prompts


def _boolq_prompts(fields: Fields) -> Prompts:
    # The published questions have no question mark.
    question = fields.question.removesuffix("?")
    passage = "" if fields.passage is None else f"{fields.passage}\n"
    context = f"{passage}Question: {question}?\nAnswer:"
    return [(context, f" {choice}") for choice in fields.choices], fields.choices


def _winogrande_prompts(fields: Fields) -> Prompts:
    start, _, rest = fields.question.partition("_")
    contexts = [start + choice for choice in fields.choices]
    return [(context, f" {rest.strip()}") for context in contexts], contexts


def _hellaswag_prompts(fields: Fields) -> Prompts:
    context, choices = _cleaned(fields.question), [_cleaned(c) for c in fields.choices]
    return [(context, f" {choice}") for choice in choices], choices


def _cleaned(text: str) -> str:
    """Removes the marks of WikiHow's headings, such as " [title]"."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


class Task(NamedTuple):
    """How a data set is read and asked.

    Attributes:
      published: function that reads a record with the data set's own fields.
      prompts: function that makes the texts to score.
      normalised: whether accuracies by length-normalized scores are reported, too.
    """

    published: Callable[[Record], Fields]
    prompts: Callable[[Fields], Prompts]
    normalised: bool


TASKS = {
    "arc_challenge": Task(_arc, _template("Question: {}\nAnswer:"), True),
    "arc_easy": Task(_arc, _template("Question: {}\nAnswer:"), True),
    "boolq": Task(_boolq, _boolq_prompts, False),
    "hellaswag": Task(_hellaswag, _hellaswag_prompts, True),
    "openbookqa": Task(_openbookqa, _template("{}"), True),
    "piqa": Task(_piqa, _template("Question: {}\nAnswer:"), True),
    "social_iqa": Task(_social_iqa, _template("Q: {}\nA:"), False),
    "winogrande": Task(_winogrande, _winogrande_prompts, False),
}
OTHER_NAMES = {"social_i_qa": "social_iqa", "siqa": "social_iqa"}


def read_questions(path: str | Path, task: str) -> QuestionSet:
    """Reads the questions of a file.

    Args:
      path: a ``.jsonl`` or ``.jsonl.gz`` file; the module's docstring describes its lines.
      task: a key of `TASKS`.

    Returns:
      The questions.

    Raises:
      KeyError: if there is no such task.
      FileNotFoundError: if there is no such file.
      ValueError: if a line is not as described; says where.
    """
    if task not in TASKS:
        raise KeyError(f"no task {task!r}; expected one of {', '.join(TASKS)}")
    records, sha256 = record_files.records(path, "questions with choices")
    found = [(where, _fields(Record(where, record), task)) for where, record in records]
    questions = []
    for where, fields in found:
        pairs, choices = TASKS[task].prompts(fields)
        questions.append(Question(where, tuple(pairs), tuple(choices), fields.answer))
    closed = task == "boolq" and any(fields.passage is None for _, fields in found)
    notes = ("questions without their passages: no published number",) if closed else ()
    return QuestionSet(task, tuple(questions), sha256, notes)


def _fields(record: Record, task: str) -> Fields:
    plain = "question" in record and "choices" in record and "answer" in record
    fields = _plain(record) if plain else TASKS[task].published(record)
    if len(fields.choices) < 2 or not all(choice.strip() for choice in fields.choices):
        raise ValueError(f"{record.where}: choices {fields.choices}; expected 2 or more, not empty")
    if not fields.question.strip() or (task == "winogrande" and "_" not in fields.question):
        blank = " with a _ for the choice" if task == "winogrande" else ""
        raise ValueError(f"{record.where}: {fields.question!r}; expected a question{blank}")
    return fields


def task_from_name(path: str | Path) -> str | None:
    """Returns the task that a file is named after; None if its name is no task."""
    stem = Path(path).name.split(".")[0]
    name = re.sub(r"\W", "_", stem).lower()
    name = OTHER_NAMES.get(name, name)
    return name if name in TASKS else None
