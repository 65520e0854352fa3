"""Programs out of the answers of chat models."""

import pytest

from lordjax.evaluate import pass_at_k
from lordjax.evaluate.chat_answers import completion, question
from lordjax.evaluate.code_problems import MBPP_STOPS, Problem, ProblemSet

HUMANEVAL = Problem(
    "T/0",
    "from typing import List\n\n\ndef helper(x):\n    return x + 1\n\n\n"
    'def f(x: int) -> int:\n    """Adds two."""',
    "\n    return helper(x) + 1\n",
    "def check(f):\n    assert f(1) == 3\n\ncheck(f)",
    "f",
)
MBPP = Problem("MBPP/1", '"""\nAdd one.\nassert g(1) == 2\n"""\n', "", "assert g(1) == 2")
WHOLE = "def f(x: int) -> int:\n    return helper(x) + 1"
# Kind of an answer -> the answer.
RIGHT = {
    "a fence": f"Sure!\n\n```python\n{WHOLE}\n```\nIt adds two.",
    "a fence without a language": f"```\n{WHOLE}\n```",
    "a fence that is never closed": f"```python\n{WHOLE}",
    "an indented fence": f"1. Here:\n  ```py\n{WHOLE}\n  ```",
    "the second fence": f"Call it so:\n```python\nprint(f(1))\n```\n\n```python\n{WHOLE}\n```",
    "all of the text": WHOLE,
    "the rest of the function": "```python\n    return helper(x) + 1\n```",
    "with the prompt's own start": f"```python\n{HUMANEVAL.prompt}\n    return helper(x) + 1\n```",
    "other annotations": "```python\ndef f(x: List[int]) -> 'List':\n    return x + 2\n```",
    "after a thought": f"<think>```\ndef f(x): return 0\n```</think>\n```\n{WHOLE}\n```",
}


def passes(problem, answer):
    """Runs the program here: the answers are ours."""
    program = problem.program(completion(problem, answer)) + problem.tests
    try:
        exec(compile(program, "answer", "exec"), {})
    except (AssertionError, SyntaxError, NameError, TypeError):
        return False
    return True


@pytest.mark.parametrize("kind", RIGHT)
def test_the_program_is_found_in_an_answer(kind):
    assert passes(HUMANEVAL, RIGHT[kind])


@pytest.mark.parametrize(
    "answer",
    ["", "I cannot do that.", "```python\ndef other(x):\n    return x + 2\n```", "```python\n```"],
)
def test_an_answer_without_the_function_fails(answer):
    assert not passes(HUMANEVAL, answer)


def test_a_problem_without_a_start():
    assert passes(MBPP, "```python\ndef g(x):\n    return x + 1\n```")
    assert not passes(MBPP, "```python\ndef g(x):\n    return x\n```")


def test_questions_hold_the_problem():
    assert HUMANEVAL.prompt in question(HUMANEVAL)
    assert "Add one.\nassert g(1) == 2" in question(MBPP) and '"""' not in question(MBPP)


def test_answers_are_not_cut_at_stop_strings(monkeypatch):
    """A whole function has line breaks and definitions, where a completion would end."""
    problems = ProblemSet("humaneval", (HUMANEVAL,), ("\ndef", *MBPP_STOPS), "0")
    monkeypatch.setattr(pass_at_k, "_check", lambda *given: None)
    monkeypatch.setattr(
        pass_at_k.sandbox,
        "run",
        lambda program, limits, weak: pass_at_k.Result(pass_at_k.sandbox.PASSED, "", 0.0, "", {}),
    )
    seen = []

    def judge(problems, rows, **how):
        seen.extend(rows)
        return {"protocol": {}}

    monkeypatch.setattr(pass_at_k, "judge", judge)
    asked = []

    def complete(prompts):
        asked.extend(prompts)
        return [RIGHT["the second fence"]] * 2

    found = pass_at_k.evaluate(problems, complete, samples=2, chat=True, allow_execution=True)
    assert asked == [question(HUMANEVAL)] * 2
    assert seen == [[completion(HUMANEVAL, RIGHT["the second fence"])] * 2]
    assert found["protocol"] == {"stop_strings": [], "chat": True}
