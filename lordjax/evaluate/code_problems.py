"""Problems whose answers are programs: HumanEval and MBPP.

- **HumanEval**: the completion goes on after a signature and a docstring. Prompts are stripped of
  white space at their ends, as in most published numbers: a line break and the indent behind it
  are often one token, which a prompt that ends with the line break keeps from being written.
  Source: Chen et al., Evaluating large language models trained on code (arXiv 2107.03374), where
  prompts are not stripped.
- **MBPP**: no examples; a docstring of the description and the first test, then the completion
  brings the whole function. Source of the problems: Austin et al., Program synthesis with large
  language models (arXiv 2108.07732); of the prompt: Fried et al., InCoder (arXiv 2204.05999).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from lordjax.data import documents

# What ends a completion. The first five of HumanEval are those of Chen et al. (section 3.2); the
# others of both sets are those of the BigCode evaluation harness.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```", "<file_sep>")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
WHAT = "HumanEval or MBPP"


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is asked, and how an answer is tested.

    Attributes:
      task_id: its name in its set.
      prompt: the beginning of the program, which is to be completed.
      solution: a completion that is right.
      tests: the end of the program.
    """

    task_id: str
    prompt: str
    solution: str
    tests: str

    def program(self, completion: str) -> str:
        """The source that runs to its end if the completion is right."""
        return f"{self.prompt}{completion}\n\n{self.tests}\n"


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """Problems of one file.

    Attributes:
      name: of the format, ``humaneval`` or ``mbpp``.
      problems: in the order of the file.
      stops: what ends a completion.
      sha256: of the file's text, unpacked.
    """

    name: str
    problems: tuple[Problem, ...]
    stops: tuple[str, ...]
    sha256: str

    def first(self, count: int) -> ProblemSet:
        """The same with its first problems only."""
        return dataclasses.replace(self, problems=self.problems[:count])


def read_humaneval(path: str | Path, *, strip: bool = True) -> ProblemSet:
    """Reads lines of ``task_id``, ``prompt``, ``canonical_solution``, ``entry_point``, ``test``.

    Args:
      path: a ``.jsonl`` or ``.jsonl.gz`` file.
      strip: whether prompts lose the white space at their ends; see the module's docstring.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line is not such a record, or a task is there twice; says where.
    """
    records, sha256 = documents.records(path, WHAT)
    problems = []
    for where, record in records:
        names = ("task_id", "prompt", "canonical_solution", "entry_point", "test")
        task_id, prompt, solution, entry, test = (_text(record, n, where) for n in names)
        asked = prompt.strip() if strip else prompt
        gap = prompt[len(prompt.rstrip()) :] if strip else ""
        problems.append(Problem(task_id, asked, gap + solution, f"{test}\ncheck({entry})"))
    return _set(Path(path), "humaneval", problems, HUMANEVAL_STOPS, sha256)


def read_mbpp(path: str | Path) -> ProblemSet:
    """Reads lines of ``text``, ``code``, ``task_id``, ``test_setup_code`` and ``test_list``.

    ``challenge_test_list`` is not used, as in published numbers.

    Args:
      path: a ``.jsonl`` or ``.jsonl.gz`` file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line is not such a record, or a task is there twice; says where.
    """
    records, sha256 = documents.records(path, WHAT)
    problems = []
    for where, record in records:
        text, code, setup = (_text(record, n, where) for n in ("text", "code", "test_setup_code"))
        tests = record.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise ValueError(f'{where}: "test_list" is {tests!r}; expected a list of tests')
        prompt = f'"""\n{text}\n{tests[0]}\n"""\n'
        task_id = f"MBPP/{record.get('task_id')}"
        problems.append(Problem(task_id, prompt, code, "\n".join([setup, *tests])))
    return _set(Path(path), "mbpp", problems, MBPP_STOPS, sha256)


def read_problems(path: str | Path) -> ProblemSet:
    """Reads a file of either kind, which its first record tells.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is of neither kind; says where.
    """
    where, record = documents.records(path, WHAT)[0][0]
    for key, read in {"entry_point": read_humaneval, "test_list": read_mbpp}.items():
        if key in record:
            return read(path)
    raise ValueError(
        f'{where}: expected a record with "entry_point" (HumanEval) or "test_list" (MBPP)'
    )


def _set(
    path: Path, name: str, problems: list[Problem], stops: tuple[str, ...], sha256: str
) -> ProblemSet:
    counts = Counter(problem.task_id for problem in problems)
    if twice := [task for task, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: {twice[0]} is there twice; expected every task once")
    return ProblemSet(name, tuple(problems), stops, sha256)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(text := record.get(key), str):
        raise ValueError(f'{where}: "{key}" is {text!r}; expected text')
    return text
