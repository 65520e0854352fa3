"""Small HumanEval and MBPP files: readers, pass@k, and results of right and wrong programs."""

import dataclasses
import functools
import gzip
import itertools
import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lordjax.evaluate import pass_at_k as programs
from lordjax.evaluate.code_problems import (
    HUMANEVAL_STOPS,
    MBPP_STOPS,
    read_humaneval,
    read_mbpp,
    read_problems,
)
from lordjax.evaluate.pass_at_k import evaluate, judge, pass_at_k, truncate
from lordjax.evaluate.sandbox import Limits
from lordjax.generation import completion
from lordjax.generation.sampling import Sampling
from lordjax.scripts.verbs import evaluate_code as script

HUMANEVAL = [
    {
        "task_id": "Small/0",
        "prompt": 'import math\n\n\ndef add(a: int, b: int) -> int:\n    """ Sum. """\n',
        "canonical_solution": "    return a + b\n",
        "entry_point": "add",
        "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n",
    },
    {
        "task_id": "Small/1",
        "prompt": '\ndef twice(f):\n    """ f of f. """\n    g = f\n\n',
        "canonical_solution": "    def h(x):\n        return g(f(x))\n    return h\n",
        "entry_point": "twice",
        "test": "def check(candidate):\n    assert candidate(abs)(-1) == 1\n"
        "    assert candidate(lambda x: x + 1)(0) == 2",
    },
]
MBPP = [
    {
        "task_id": 7,
        "text": "Write a function to reverse a list.",
        "code": "def back(xs):\r\n\treturn xs[::-1]",
        "test_setup_code": "",
        "test_list": ["assert back([1, 2]) == [2, 1]", "assert back([]) == []"],
        "challenge_test_list": ["assert False"],
    },
    {
        "task_id": 8,
        "text": "Write a function to read a node.",
        "code": "def value(node): return node.value",
        "test_setup_code": "class Node:\n    value = 3\nroot = Node()",
        "test_list": ["assert value(root) == 3"],
        "challenge_test_list": [],
    },
]


def write(path, records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def humaneval(tmp_path):
    return write(tmp_path / "humaneval.jsonl", HUMANEVAL)


@pytest.fixture
def mbpp(tmp_path):
    return write(tmp_path / "mbpp.jsonl", MBPP)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@given(st.integers(1, 3000), st.data())
def test_pass_at_k_is_exact_where_binomials_overflow(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    missed = math.comb(n - c, k)
    assert value == pytest.approx(1 - missed / math.comb(n, k), abs=1e-11)
    assert 0 <= value <= 1 and (value == 0) == (c == 0)


@pytest.mark.parametrize(("n", "c", "k"), [(2, 3, 1), (2, 1, 3), (2, 1, 0), (2, -1, 1), (0, 0, 1)])
def test_pass_at_k_of_impossible_counts_is_an_error(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples, {c} right"):
        pass_at_k(n, c, k)


@given(st.text("ab\n"), st.lists(st.text("ab\n", min_size=1), max_size=3))
def test_truncation_ends_before_the_first_stop_string(text, stops):
    short = truncate(text, stops)
    assert text.startswith(short)
    # No stop string begins before the cut, and one begins there.
    assert not any(stop in text[: len(short) + len(stop) - 1] for stop in stops)
    assert short == text or any(text.startswith(stop, len(short)) for stop in stops)


def test_stop_strings_end_what_follows_a_function_and_not_the_function():
    body = "    # sum\n    if a: print(a)\n    return a + b\n"
    for rest in ("\ndef f():", "\nclass A:", "\n# next", "\nif __name__", "\nprint(1)", "\n@f"):
        assert truncate(body + rest, HUMANEVAL_STOPS) == body
    function = "import math\n\ndef helper():\n    pass\n\ndef f():\n    return 1\n"
    for rest in ("\nassert f()", "\nprint(f())", '\n"""', "\n```", "\nclass A:"):
        assert truncate(function + rest, MBPP_STOPS) == function


@pytest.mark.parametrize("strip", [True, False])
def test_humaneval_is_read_and_its_solutions_pass(humaneval, strip):
    found = read_humaneval(humaneval, strip=strip)
    assert [p.task_id for p in found.problems] == ["Small/0", "Small/1"]
    for problem, record in zip(found.problems, HUMANEVAL, strict=True):
        prompt = record["prompt"]
        assert problem.prompt == (prompt.strip() if strip else prompt)
        whole = (prompt + record["canonical_solution"]).strip()
        assert (problem.prompt + problem.solution).strip() == whole
    result = judge(found, [[p.solution] for p in found.problems], allow_execution=True)
    assert result["pass_at"] == {1: 1.0}


def test_mbpp_is_read_and_its_solutions_pass(mbpp):
    found = read_mbpp(mbpp)
    assert [p.task_id for p in found.problems] == ["MBPP/7", "MBPP/8"]
    prompt = found.problems[0].prompt
    assert prompt == f'"""\n{MBPP[0]["text"]}\n{MBPP[0]["test_list"][0]}\n"""\n'
    result = judge(found, [[p.solution] for p in found.problems], allow_execution=True)
    assert result["pass_at"] == {1: 1.0}


def test_wrong_solutions_never_pass(humaneval, mbpp):
    for found in (read_problems(humaneval), read_problems(mbpp)):
        name = {"humaneval": "    ", "mbpp": "def back(xs): "}[found.name]
        wrong = [
            "",
            f"\n{name}pass",
            f"\n{name}return None",
            f"\n{name}return (",
            "\n    import sys; sys.exit(0)",
            "\nimport os; os._exit(0)",
            "\nraise SystemExit(0)",
            "\nif True:",
            '\n"""',
        ]
        result = judge(found, [wrong] * len(found.problems), allow_execution=True)
        assert result["pass_at"] == {1: 0.0}
        assert {s["outcome"] for row in result["rows"] for s in row["samples"]} == {"failed"}
        assert all(s["error"] for row in result["rows"] for s in row["samples"])


def test_packed_and_plain_files_are_the_same_set(humaneval, tmp_path):
    packed = write(tmp_path / "packed.jsonl.gz", HUMANEVAL)
    assert read_problems(packed) == read_problems(humaneval)
    assert read_problems(humaneval).first(1).problems == read_problems(humaneval).problems[:1]


def test_files_that_are_none_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read_problems(tmp_path / "none.jsonl")
    bad = {
        "": "empty; expected a JSON object",
        "{": "line 1: not JSON",
        "\n[1]": "line 2: list; expected a JSON object",
        '{"a": 1}': 'line 1: expected a JSON object with "entry_point"',
        json.dumps(HUMANEVAL[0] | {"test": None}): 'line 1: "test" is None; expected text',
        json.dumps(MBPP[0] | {"test_list": []}): 'line 1: "test_list" is',
        "\n".join(json.dumps(MBPP[0]) for _ in range(2)): "MBPP/7 is there twice",
    }
    path = tmp_path / "bad.jsonl"
    for text, message in bad.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bad\.jsonl") as caught:
            read_problems(path)
        assert message in str(caught.value)
    for data, message in (
        (b"no gzip", "cannot be read as"),
        (gzip.compress(b"text")[:-4], "cannot be read as"),
        (gzip.compress(b"\xff"), "byte 0xff at offset 0 is not UTF-8"),
    ):
        packed = tmp_path / "bad.jsonl.gz"
        packed.write_bytes(data)
        with pytest.raises(ValueError, match=rf"bad\.jsonl\.gz: {message}"):
            read_problems(packed)


RIGHT, WRONG = "\n    return a + b\n\nprint(add(1, 2))", "\n    return a - b"


def test_samples_are_counted_by_problem(humaneval):
    found, seen = read_problems(humaneval), []

    def complete(prompts):
        seen.append(prompts)
        return [RIGHT, WRONG, WRONG, RIGHT] + [WRONG] * 4

    result = evaluate(found, complete, samples=4, ks=(1, 2, 4), workers=2, allow_execution=True)
    assert seen == [[found.problems[0].prompt] * 4 + [found.problems[1].prompt] * 4]
    first, second = result["rows"]
    assert (first["task_id"], first["n"], first["correct"]) == ("Small/0", 4, 2)
    assert [s["outcome"] for s in first["samples"]] == ["passed", "failed", "failed", "passed"]
    # What is behind a stop string is neither run nor reported.
    assert first["samples"][0]["completion"] == "\n    return a + b\n"
    assert second["correct"] == 0
    for k in (1, 2, 4):
        assert result["pass_at"][k] == pytest.approx(pass_at_k(4, 2, k) / 2)
    protocol = result["protocol"]
    assert protocol["data_sha256"] == found.sha256 and protocol["samples"] == 4
    assert protocol["stop_strings"] == list(found.stops)
    assert protocol["limits"] == dataclasses.asdict(Limits())
    assert protocol["isolation"]["network"]
    json.dumps(result)


def test_nothing_is_generated_without_leave_to_run(humaneval):
    def complete(prompts):
        raise AssertionError

    found = read_problems(humaneval)
    with pytest.raises(PermissionError, match="allow_execution=True"):
        evaluate(found, complete)
    with pytest.raises(ValueError, match=r"pass@k of k \[2\] with 1 samples"):
        evaluate(found, complete, ks=(2,), allow_execution=True)
    with pytest.raises(ValueError, match="an empty program does not pass"):
        evaluate(found, complete, limits=Limits(seconds=1e-9), allow_execution=True)
    with pytest.raises(PermissionError, match="allow_execution=True"):
        judge(found, [["", ""]] * 2)


def test_nothing_is_generated_where_isolation_is_weak(humaneval, monkeypatch):
    found, asked = read_problems(humaneval), []

    def complete(prompts):
        asked.extend(prompts)
        return [RIGHT] * len(prompts)

    weaker = functools.partial(programs.sandbox.run, without=["filter"])
    monkeypatch.setattr(programs.sandbox, "run", weaker)
    with pytest.raises(
        PermissionError, match=r"too weakly \(network: namespace.*system_calls: all"
    ):
        evaluate(found, complete, allow_execution=True)
    assert not asked
    how = {"allow_execution": True, "allow_weak_isolation": True}
    monkeypatch.setattr(
        programs.sandbox, "run_all", lambda texts, *a, **k: [weaker("", weak=True)] * 2
    )
    result = evaluate(found, complete, **how)
    assert asked and result["protocol"]["isolation"]["system_calls"] == "all"


def test_wrong_numbers_of_completions_are_errors(humaneval):
    found = read_problems(humaneval)
    with pytest.raises(ValueError, match="1 completions of 2 prompts"):
        evaluate(found, lambda prompts: ["pass"], allow_execution=True)
    for completions in ([["", ""], [""]], [[""]]):
        with pytest.raises(ValueError, match="expected those of 2 problems"):
            judge(found, completions, allow_execution=True)


def test_every_isolation_that_was_in_force_is_reported(humaneval, monkeypatch):
    results = iter(["namespace", "socket module"])

    def run_all(sources, *args, **kwargs):
        return [
            SimpleNamespace(outcome="failed", error="", seconds=0.0, isolation={"network": value})
            for value in itertools.islice(results, len(sources))
        ]

    monkeypatch.setattr(programs.sandbox, "run_all", run_all)
    result = judge(read_problems(humaneval), [[""], [""]], allow_execution=True)
    assert result["protocol"]["isolation"] == {"network": "namespace, socket module"}


SETTINGS = {
    "samples": 1,
    "temperature": 0.0,
    "top_p": None,
    "max_new_tokens": 16,
    "seed": 0,
    "batch": 3,
    "seconds": 10.0,
    "workers": None,
    "first": None,
    "chat": False,
    "run_generated_code": True,
    "allow_weak_isolation": False,
    "out": None,
    "reference": False,
}


@pytest.fixture
def calls(monkeypatch):
    """Replaces the model by one that can only add; returns the arguments of its batches."""
    seen = []

    def complete(params, config, tokenizer, prompts, **how):
        assert (params, tokenizer) == ("params", "tokenizer") and config.head == "causal"
        seen.append({"prompts": prompts, **how})
        return [completion.Completion(RIGHT, 1, "end") for _ in prompts]

    monkeypatch.setattr(completion, "complete", complete)
    opened = SimpleNamespace(
        config=SimpleNamespace(head="causal"),
        arrays=lambda: "params",
        tokenizer=lambda: "tokenizer",
        stop_tokens=lambda tokenizer, chat: [7],
    )
    monkeypatch.setattr(script, "open_model", lambda name: opened)
    return seen


def test_a_model_is_evaluated_and_its_rows_are_written(humaneval, tmp_path, calls, capsys):
    out = tmp_path / "new" / "rows.jsonl"
    how = {"samples": 2, "temperature": 0.8, "top_p": 0.9, "out": str(out), "seed": 5}
    result = script.evaluate_code("model", problems=str(humaneval), **{**SETTINGS, **how})
    assert result["pass_at"] == {1: 0.5} and result["unsolved"] == ["Small/1"]
    assert result["outcomes"] == {"passed": 2, "failed": 2}
    (call,) = calls
    assert len(call["prompts"]) == 4 and call["seed"] == 5
    assert call["sampling"] == Sampling(0.8, top_p=0.9)
    assert call["max_new_tokens"] == 16 and call["stop_strings"] == HUMANEVAL_STOPS
    assert call["stop_tokens"] == [7]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["task_id"], row["correct"]) for row in rows] == [("Small/0", 2), ("Small/1", 0)]
    assert list(out.parent.iterdir()) == [out]
    assert result["protocol"]["temperature"] == 0.8 and result["protocol"]["seed"] == 5
    json.dumps(result)
    script.show(result)
    assert "pass@1           0.5000\n" in capsys.readouterr().out


def test_the_solutions_of_a_set_are_its_reference(mbpp, humaneval, tmp_path, calls):
    for path in (mbpp, humaneval):
        how = {**SETTINGS, "reference": True, "samples": 20}
        result = script.evaluate_code(None, problems=str(path), **how)
        assert result["pass_at"] == {1: 1.0} and result["unsolved"] == []
        assert script.evaluate_code(None, problems=str(path), **{**how, "first": 1})["tasks"] == 1
    assert not calls


def test_bad_settings_are_errors_before_a_model_is_opened(humaneval, calls):
    bad = [
        ({"reference": True}, ValueError, "either a MODEL or --reference"),
        ({"samples": 0}, ValueError, "--samples 0"),
        ({"first": 0}, ValueError, "--first 0"),
        ({"samples": 2}, ValueError, "would all be the same"),
        ({"run_generated_code": False}, PermissionError, "--run-generated-code"),
        ({"out": str(humaneval)}, FileExistsError, "exists"),
    ]
    for how, kind, message in bad:
        with pytest.raises(kind, match=message):
            script.evaluate_code("model", problems=str(humaneval), **{**SETTINGS, **how})
    with pytest.raises(ValueError, match="give either a MODEL or --reference"):
        script.evaluate_code(None, problems=str(humaneval), **SETTINGS)
    assert not calls
