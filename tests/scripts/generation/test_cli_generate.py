"""``lordjax generate``, ``evaluate-code`` and ``benchmark``."""

import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from commands import fails, run

from lordjax.generation.completion import complete, pieces
from lordjax.generation.sampling import Sampling
from lordjax.kernels import trees
from lordjax.kernels.convert import encode, factorize
from lordjax.scripts.cli import cli
from lordjax.scripts.opened_model import open_model
from lordjax.scripts.verbs.benchmark import operations

PROBLEMS = [
    {
        "task_id": f"T/{i}",
        "prompt": f"def f{i}(x):\n",
        "canonical_solution": f"    return x + {i}\n",
        "entry_point": f"f{i}",
        "test": f"def check(f):\n    assert f(1) == {i + 1}\n",
    }
    for i in range(3)
]


@pytest.fixture(scope="module")
def opened(tiny):
    return open_model(str(tiny))


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "set.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path


def texts(opened, prompts, **how):
    given = opened.params(), opened.config, opened.tokenizer()
    return complete(*given, prompts, max_new_tokens=16, **how)


def test_parameters_block_by_block_are_those_at_once(opened):
    expected, found = (trees.flatten(tree) for tree in (opened.params(), opened.arrays()))
    assert expected.keys() == found.keys()
    for path, array in found.items():
        assert isinstance(array, jax.Array) and np.array_equal(array, expected[path])


def test_generate(tiny, opened):
    (expected,) = texts(opened, ["def f(x):"])
    shown = run("generate", tiny, "def f(x):", "--max-new-tokens", 16)
    assert shown.exit_code == 0
    assert shown.stdout == expected.text + "\n"
    piped = CliRunner().invoke(
        cli, ["generate", str(tiny), "-", "--max-new-tokens", "16", "--json"], input="def f(x):"
    )
    assert json.loads(piped.stdout)["text"] == expected.text


def test_a_stop_string_is_not_shown(opened):
    (free,) = texts(opened, ["def f(x):"])
    stop = free.text[3:5]
    (cut,) = texts(opened, ["def f(x):"], stop_strings=[stop])
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.reason == "text"
    given = opened.params(), opened.config, opened.tokenizer()
    ids = opened.tokenizer()("def f(x):")["input_ids"]
    for chunk in (1, 4):
        how = {"max_new_tokens": 16, "stop_strings": [stop], "chunk": chunk}
        assert "".join(pieces(*given, ids, **how)) == cut.text


def test_an_answer_does_not_depend_on_the_batch(opened):
    prompts = ["a", "def g(y):\n    return", "class A:", "# x", ""]
    how = {"sampling": Sampling(1.0, top_k=20), "seed": 5}
    together = texts(opened, prompts, **how, batch_size=5)
    assert texts(opened, prompts, **how, batch_size=2) == together
    assert len({answer.text for answer in together}) == len(prompts)


def test_interactive(tiny, opened):
    arguments = ["generate", str(tiny), "--interactive", "--max-new-tokens", "8"]
    result = CliRunner().invoke(cli, arguments, input="one\ntwo\n")
    given = opened.params(), opened.config, opened.tokenizer()
    (first,) = complete(*given, ["one"], max_new_tokens=8)
    (second,) = complete(*given, ["one" + first.text + "two"], max_new_tokens=8)
    assert result.stdout == f"{first.text}\n{second.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a PROMPT"),
        (["x", "--interactive"], "give a PROMPT"),
        (["x", "--chat"], "no chat template; leave --chat out"),
        (["x", "--top-p", 0], "0.0 is not in the range"),
        (["x" * 60], "the model's longest sequence is 64"),
    ],
)
def test_wrong_flags_of_generate(tiny, arguments, message):
    fails(message, "generate", tiny, *arguments)


def test_evaluate_code(tiny, problems, tmp_path):
    out = tmp_path / "results.jsonl"
    common = ("--problems", problems, "--json")
    refused = run("evaluate-code", tiny, *common, "--out", out)
    assert refused.exit_code == 2 and "--run-generated-code" in refused.stderr
    assert not out.exists()
    how = ("--max-new-tokens", 8, "--batch", 2, "--run-generated-code", "--out", out)
    result = json.loads(run("evaluate-code", tiny, *common, *how).stdout)
    assert result["pass_at"] == {"1": 0.0}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["task_id"] for line in lines] == ["T/0", "T/1", "T/2"]
    fails(
        "no chat template; leave --chat out", "evaluate-code", tiny, *common[:2], *how[:5], "--chat"
    )
    right = run("evaluate-code", *common, "--reference", "--run-generated-code")
    assert json.loads(right.stdout)["pass_at"] == {"1": 1.0}


def test_codes_multiply_as_often_as_what_they_stand_for(opened):
    params, config = opened.arrays(), opened.config
    codes = encode(params, "nf4", where=r"layer_\d+/.*/kernel$")
    dense = operations(config, params, 2, 16)
    assert operations(config, codes, 2, 16) == dense
    thin = factorize(params, keep=0.5, where=r"layer_\d+/.*/kernel$")
    assert operations(config, thin, 2, 16) < dense


def test_benchmark_of_one_model(tiny):
    how = ["--prefill", 8, "--prompt", 4, "--new", 4, "--batches", "1", "--repeats", 1]
    (row,) = json.loads(run("benchmark", tiny, *how, "--json").stdout)["models"]
    assert row["model"] == str(tiny) and row["prefill"] > 0 and set(row["decode"]) == {"1"}


@pytest.mark.full
def test_benchmark(tiny, text, tmp_path):
    small = tmp_path / "small"
    options = ("--calibration", text, "--seq-len", 32, "--method", "lord", "--keep", 0.5)
    assert run("compress", tiny, small, *options).exit_code == 0
    how = ["--prefill", 32, "--prompt", 8, "--new", 8, "--batches", "1,2", "--repeats", 1]
    how += ["--tokens", text, "--windows", 2, "--transformers", tiny]
    how += ["--picture", tmp_path / "made" / "p.png"]
    result = run("benchmark", tiny, small, *how, "--json")
    found = json.loads(result.stdout)["models"]
    assert [row["model"] for row in found[:2]] == [str(tiny), str(small)]
    assert len(found) == 3  # and torch
    for row in found:
        assert row["prefill"] > 0 and set(row["decode"]) == {"1", "2"}
    assert found[1]["bytes"] < found[0]["bytes"]
    assert found[1]["operations"] < found[0]["operations"]
    assert (tmp_path / "made" / "p.png").read_bytes()[:4] == b"\x89PNG"
