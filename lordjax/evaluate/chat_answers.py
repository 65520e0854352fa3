"""Programming problems as questions to a chat model, and the programs in its answers.

The question holds the start of the program in a fence of Markdown and asks for the whole function.
Of the answer, the first fenced block counts that defines the function, else the first block, else
all of the text. What a model thinks before it answers does not count.
"""

from __future__ import annotations

import re

from lordjax.evaluate.code_problems import Problem

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_THOUGHT = "</think>"
_ASKED = "Answer with the whole function, with its imports, in one Python code block."


def question(problem: Problem) -> str:
    """Returns the question that a chat model is asked."""
    start = problem.prompt.strip()
    if problem.entry is None:
        text = start.strip('"').strip()
        return (
            f"Write a Python function for this task, which must pass this test. {_ASKED}\n\n{text}"
        )
    return f"Complete this Python function. {_ASKED}\n\n```python\n{start}\n```"


def completion(problem: Problem, answer: str) -> str:
    """Returns the code of an answer, as a completion of the problem's prompt.

    Args:
      problem: the problem.
      answer: the answer of a chat model to `question`.
    """
    text = answer.rpartition(_THOUGHT)[2]
    blocks = [match[1] for match in _FENCE.finditer(text)] or [text]
    if problem.entry is None:
        return blocks[0].strip("\n")
    defines = re.compile(rf"^(async )?def {re.escape(problem.entry)}\b", re.MULTILINE)
    for block in blocks:
        if defines.search(block):
            # The prompt keeps its imports and helpers; its function is defined a second time.
            return f"\n    pass\n\n\n{block}"
    return "\n" + blocks[0].strip("\n")  # the rest of the function
