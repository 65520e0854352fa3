"""Programming problems: HumanEval and MBPP.

- **HumanEval**: the model completes a function after its signature and docstring. White space at
  the end of a prompt is stripped, as for most published numbers: a line break and the following
  indent are often one token, which the model cannot write after a prompt that ends with the line
  break. Source: Chen et al., Evaluating large language models trained on code (arXiv 2107.03374),
  where prompts are not stripped.
- **MBPP**: zero-shot; the prompt is a docstring of the description and the first test, and the
  model writes the whole function. Source of the problems: Austin et al., Program synthesis with
  large language models (arXiv 2108.07732); of the prompt: Fried et al., InCoder (arXiv 2204.05999).
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lordjax.data import record_files
from lordjax.evaluate.sandbox import Checks

# Stop strings, which end a completion. The first five of HumanEval are from Chen et al. (section
# 3.2); all others are from the BigCode evaluation harness.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```", "<file_sep>")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
WHAT = "HumanEval or MBPP"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A programming problem and its tests.

    Attributes:
      task_id: the problem's name in its data set.
      prompt: the start of the program, which the model completes.
      solution: a right completion.
      tests: the end of the program, which tests the completion.
      entry: name of the function that the prompt begins; None: the prompt begins none.
    """

    task_id: str
    prompt: str
    solution: str
    tests: str
    entry: str | None = None

    def program(self, completion: str) -> str:
        """Returns the source of the program, which defines what the tests call."""
        return f"{self.prompt}{completion}\n"

    def checks(self) -> Checks:
        """Returns the tests, for a process of their own.

        What the prompt defines besides the function that is asked for is defined there again, so
        that a completion cannot change it; so are modules that the reference solution imports.
        """
        given = _parsed(self.prompt)
        reference = _parsed(self.prompt + self.solution)
        setup = "" if given is None else self.prompt
        imports = [
            ast.unparse(node)
            for node in (reference.body if reference else ())
            if isinstance(node, ast.Import | ast.ImportFrom) and _is_standard(node)
        ]
        defined = _defined(reference) or _used(self.tests)  # there may be no solution
        names = defined - _defined(given) | ({self.entry} if self.entry else set())
        return Checks(self.tests, tuple(sorted(names)), "\n".join([setup, *imports]))


@dataclasses.dataclass(frozen=True)
class ProblemSet:
    """The problems of one file.

    Attributes:
      name: name of the format, ``humaneval`` or ``mbpp``.
      problems: the problems, in the order of the file.
      stops: stop strings, which end a completion.
      sha256: SHA-256 of the uncompressed file.
    """

    name: str
    problems: tuple[Problem, ...]
    stops: tuple[str, ...]
    sha256: str

    def first(self, count: int) -> ProblemSet:
        """Returns a set of the first ``count`` problems."""
        return dataclasses.replace(self, problems=self.problems[:count])


def read_humaneval(path: str | Path, *, strip: bool = True) -> ProblemSet:
    """Reads a HumanEval file.

    Each line has ``task_id``, ``prompt``, ``canonical_solution``, ``entry_point`` and ``test``.

    Args:
      path: a ``.jsonl`` or ``.jsonl.gz`` file.
      strip: whether to strip white space at the end of prompts; see the module's docstring.

    Returns:
      The problems.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line lacks a field, or a task occurs twice; says where.
    """
    records, sha256 = record_files.records(path, WHAT)
    problems = []
    for where, record in records:
        names = ("task_id", "prompt", "canonical_solution", "entry_point", "test")
        task_id, prompt, solution, entry, test = (_text(record, n, where) for n in names)
        asked = prompt.strip() if strip else prompt
        gap = prompt[len(prompt.rstrip()) :] if strip else ""
        problems.append(Problem(task_id, asked, gap + solution, f"{test}\ncheck({entry})", entry))
    return _set(Path(path), "humaneval", problems, HUMANEVAL_STOPS, sha256)


def read_mbpp(path: str | Path) -> ProblemSet:
    """Reads an MBPP file.

    Each line has ``text``, ``code``, ``task_id``, ``test_setup_code`` and ``test_list``. As for
    published numbers, ``challenge_test_list`` is not used.

    Args:
      path: a ``.jsonl`` or ``.jsonl.gz`` file.

    Returns:
      The problems.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line lacks a field, or a task occurs twice; says where.
    """
    records, sha256 = record_files.records(path, WHAT)
    problems = []
    for where, record in records:
        text, code, setup = (_text(record, n, where) for n in ("text", "code", "test_setup_code"))
        tests = record.get("test_list")
        if not isinstance(tests, list) or not tests or not all(isinstance(t, str) for t in tests):
            raise ValueError(f'{where}: "test_list" is {tests!r}; expected a list of texts')
        prompt = f'"""\n{text}\n{tests[0]}\n"""\n'
        task_id = f"MBPP/{record.get('task_id')}"
        problems.append(Problem(task_id, prompt, code, "\n".join([setup, *tests])))
    return _set(Path(path), "mbpp", problems, MBPP_STOPS, sha256)


def read_problems(path: str | Path) -> ProblemSet:
    """Reads a HumanEval or MBPP file; the fields of the first line decide which.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is neither; says where.
    """
    where, record = record_files.records(path, WHAT)[0][0]
    for key, read in {"entry_point": read_humaneval, "test_list": read_mbpp}.items():
        if key in record:
            return read(path)
    raise ValueError(
        f'{where}: expected a JSON object with "entry_point" (HumanEval) or "test_list" (MBPP)'
    )


def _set(
    path: Path, name: str, problems: list[Problem], stops: tuple[str, ...], sha256: str
) -> ProblemSet:
    counts = Counter(problem.task_id for problem in problems)
    if twice := [task for task, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: task {twice[0]} is there twice; expected every task once")
    return ProblemSet(name, tuple(problems), stops, sha256)


def _parsed(text: str) -> ast.Module | None:
    """Returns the parsed text; None if it is no whole program."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):  # the latter for characters that no source may hold
        return None


def _defined(tree: ast.Module | None) -> set[str]:
    """Returns the names of functions and classes that a program defines."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in (tree.body if tree else ()) if isinstance(node, kinds)}


def _used(text: str) -> set[str]:
    """Returns the names that a text reads, without those of Python itself."""
    nodes = ast.walk(_parsed(text) or ast.Module([], []))
    return {node.id for node in nodes if isinstance(node, ast.Name)} - set(dir(builtins))


def _is_standard(node: ast.Import | ast.ImportFrom) -> bool:
    """Returns whether an import is one of the standard library, which the sandbox has."""
    names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return all(name.split(".")[0] in sys.stdlib_module_names for name in names)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(text := record.get(key), str):
        raise ValueError(f'{where}: "{key}" is {text!r}; expected text')
    return text
