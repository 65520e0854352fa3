"""Multiple choice: log-likelihoods, prompts, accuracies, and the command."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import BLOCKS, source
from commands import fails, run
from hypothesis import given
from hypothesis import strategies as st
from questions import PUBLISHED, alone, log_probabilities, tokenizer_of, write

from lordjax.evaluate import likelihood, multiple_choice
from lordjax.evaluate.choice_tasks import TASKS, read_questions, task_from_name
from lordjax.evaluate.likelihood import log_likelihoods
from lordjax.kernels.convert import encode as encoded
from lordjax.models import Rope
from lordjax.scripts.opened_model import open_model

LINEAR = r"layer_\d+/.*/kernel$"


def some_pairs(config, most):
    """Returns pairs of all kinds: long, with a shared context, of one token, prefixes of others."""
    draw = np.random.default_rng(0)

    def ids(low, high):
        return [int(t) for t in draw.integers(0, config.vocab_size, draw.integers(low, high))]

    found = [(ids(1, most // 2), ids(1, most // 2)) for _ in range(6)]
    context = ids(5, 9)
    found += [(context, ids(1, 6)) for _ in range(4)]
    found += [(context, [t]) for t in range(3)] + [(context, [7, 8, 9]), ([*context, 7], [8])]
    return [*found, found[0], ([3], [4])]


@pytest.fixture(scope="module")
def model():
    return source("qwen3")


@pytest.mark.full
def test_scores_are_those_of_a_plain_pass_one_pair_at_a_time():
    model = source("gemma2")
    config, params = model.config, model.params
    pairs = some_pairs(config, 24)
    # What the model would say itself, so that something is greedy.
    first = np.asarray(log_probabilities(config, params, np.array([[5, 6]], np.int32)))
    pairs.append(([5, 6], [int(first[-1].argmax())]))
    scores = log_likelihoods(config, params, pairs, batch_size=8)
    for score, pair in zip(scores, pairs, strict=True):
        expected, best = alone(config, params, pair, config.max_positions)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.greedy == best
    assert scores[-1].greedy and not all(score.greedy for score in scores)


@pytest.mark.full
def test_a_compressed_model_is_scored_as_it_is(model):
    params = encoded(model.params, "nf4", where=LINEAR)
    pairs = some_pairs(model.config, 16)
    scores = log_likelihoods(model.config, params, pairs)
    dense = log_likelihoods(model.config, model.params, pairs)
    for score, other, pair in zip(scores, dense, pairs, strict=True):
        expected, _ = alone(model.config, params, pair, 48)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.log_likelihood != pytest.approx(other.log_likelihood, abs=1e-3)


@pytest.mark.full
def test_scores_depend_on_neither_batch_nor_bucket_nor_order(model):
    pairs = some_pairs(model.config, 24)
    expected = [
        s.log_likelihood for s in log_likelihoods(model.config, model.params, pairs, batch_size=1)
    ]
    order = np.random.default_rng(1).permutation(len(pairs))
    for batch_size in (5, 64):
        mixed = [pairs[i] for i in order]
        scores = log_likelihoods(model.config, model.params, mixed, batch_size=batch_size)
        found = np.empty(len(pairs))
        found[order] = [s.log_likelihood for s in scores]
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.full
def test_nothing_is_compiled_per_pair(model):
    likelihood._hidden.clear_cache()
    pairs = [([n, *range(1, n)], [n]) for n in range(2, 24)]
    log_likelihoods(model.config, model.params, pairs, batch_size=5)
    assert likelihood._hidden._cache_size() == 2  # of 16 and of 24


@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=6), min_size=1, max_size=12))
def test_what_begins_another_row_is_read_with_it(texts):
    config = BLOCKS["gpt2"]
    pairs = [(text[:1], text[1:]) for text in texts]
    rows, places = likelihood._merge_rows(config, pairs, config.max_positions)
    for place, text in zip(places, texts, strict=True):
        assert rows[place.row][: place.end] == text[:-1]
        assert list(place.targets) == text[1:]
    assert sorted({place.row for place in places}) == list(range(len(rows)))
    for i, one in enumerate(rows):
        assert not any(i != j and other[: len(one)] == one for j, other in enumerate(rows))


def test_a_context_that_is_too_long_loses_its_beginning(model):
    context, ids = list(range(1, 40)), [3, 1, 4]
    (short,) = log_likelihoods(model.config, model.params, [(context, ids)], max_length=8)
    # 8 tokens are read, the last of the continuation is not.
    expected, _ = alone(model.config, model.params, (context[-6:], ids), 48)
    assert short.log_likelihood == pytest.approx(expected, abs=1e-4)
    (kept,) = log_likelihoods(model.config, model.params, [(context[-6:], ids)], max_length=8)
    assert kept == short
    whole = list(range(8))
    (all_of_it,) = log_likelihoods(model.config, model.params, [(context, whole)], max_length=8)
    expected, _ = alone(model.config, model.params, (context[-1:], whole), 48)
    assert all_of_it.log_likelihood == pytest.approx(expected, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_length_are_those_of_the_pair(kind):
    base = source("qwen3")
    factors = {"short_factor": (1.0,) * 4, "long_factor": (1.0, 2.0, 3.0, 4.0)}
    more = factors if kind == "longrope" else {}
    rope = Rope(kind=kind, factor=3.0, original_max_positions=20, **more)
    config = dataclasses.replace(base.config, rope=rope)
    long = list(range(1, 31))
    # The first begins the second, whose frequencies are others.
    pairs = [(long[:19], [20]), (long[:21], [22, 4])]
    scores = log_likelihoods(config, base.params, pairs, batch_size=2)
    for score, pair in zip(scores, pairs, strict=True):
        expected, _ = alone(config, base.params, pair)
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)


def test_wrong_pairs_are_errors(model):
    score = functools.partial(log_likelihoods, model.config, model.params)
    bad = {
        r"pair 1: 0 tokens of context, 1 of": [([1], [1]), ([], [1])],
        r"pair 0: 1 tokens of context, 0 of": [([1], [])],
        r"pair 0: 1 tokens of context, 49 of": [([1], [1] * 49)],
        r"pair 0: token id 61": [([1], [61])],
    }
    for message, pairs in bad.items():
        with pytest.raises(ValueError, match=message):
            score(pairs)
    for how in ({"batch_size": 0}, {"max_length": 0}, {"max_length": 49}):
        with pytest.raises(ValueError, match="expected 1 or more, and 1 to 48"):
            score([([1], [1])], **how)
    broken = jax.tree.map(lambda a: a * jnp.nan, model.params)
    with pytest.raises(ValueError, match="pair 0: log-likelihood is nan"):
        log_likelihoods(model.config, broken, [([1], [1])])
    with pytest.raises(ValueError, match="predicts no next token"):
        log_likelihoods(BLOCKS["roberta"], {}, [([1], [1])])
    assert score([]) == []


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of("the cat sat on the mat and the hat", eos_token="<end>")


def test_contexts_and_continuations_are_encoded_as_one_text(tokenizer):
    for context, rest in (("the cat", " sat"), ("the c", "at"), ("the", " cat sat on"), ("x", "y")):
        start, ids = multiple_choice.tokenize_pair(tokenizer, context, rest)
        assert start == tokenizer.encode(context)
        whole = tokenizer.encode(context + rest)
        assert ids == whole[len(start) :]
        # Spaces at the context's end belong to what follows.
        for spaces in (" ", "  "):
            moved = multiple_choice.tokenize_pair(tokenizer, context + spaces, rest.lstrip())
            assert moved == multiple_choice.tokenize_pair(
                tokenizer, context, spaces + rest.lstrip()
            )


def test_what_stands_for_an_empty_context(tokenizer):
    end = tokenizer.eos_token_id
    assert multiple_choice.tokenize_pair(tokenizer, "", "the cat") == (
        [end],
        tokenizer.encode("the cat"),
    )
    begun = multiple_choice.tokenize_pair(tokenizer, "", "<end>the")
    assert begun == ([end], tokenizer.encode("the"))
    with pytest.raises(ValueError, match="no BOS or EOS token"):
        multiple_choice.tokenize_pair(tokenizer_of("a b"), "", "the")


def test_special_tokens_are_added_once():
    from tokenizers import processors

    fast = tokenizer_of("the cat", bos_token="<s>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
    )
    first = fast.bos_token_id
    start, rest = multiple_choice.tokenize_pair(fast, "the", " cat")
    assert start[0] == first and first not in [*start[1:], *rest]
    assert multiple_choice.tokenize_pair(fast, "<s>the", " cat") == (start, rest)


def test_scores_are_normalised_by_characters_and_by_bytes():
    # Four characters, and three of two bytes each.
    texts = ("four", "äöü")
    assert multiple_choice.pick([-4.0, -3.5], texts, "acc") == 1
    assert multiple_choice.pick([-4.0, -3.5], texts, "acc_norm") == 0
    assert multiple_choice.pick([-4.0, -3.5], texts, "acc_bytes") == 1
    assert multiple_choice.pick([-1.0, -1.0], ("a", "b"), "acc") == 0  # of equal ones the first


PLAIN = {
    "arc_easy": ("What?", ["one", "two"]),
    "arc_challenge": ("What?", ["one", "two"]),
    "openbookqa": ("What?", ["one", "two"]),
    "piqa": ("What?", ["one", "two"]),
    "boolq": ("is it?", ["no", "yes"]),
    "social_iqa": ("It is. What?", ["one", "two", "three"]),
    "winogrande": ("He saw _ there .", ["A", "B"]),
    "hellaswag": ("Sewing: A man [substeps] sits. He  sews [title] well.", ["one [x]", " two"]),
}
PROMPTS = {
    "arc_easy": [("Question: What?\nAnswer:", " one"), ("Question: What?\nAnswer:", " two")],
    "openbookqa": [("What?", " one"), ("What?", " two")],
    "boolq": [(f"It is.\nQuestion: is it?\nAnswer:{e}", f" {a}") for e, a in (("", "no"),)]
    + [("It is.\nQuestion: is it?\nAnswer:", " yes")],
    "social_iqa": [("Q: It is. What?\nA:", f" {w}") for w in ("one", "two", "three")],
    "winogrande": [("He saw A", " there ."), ("He saw B", " there .")],
    "hellaswag": [
        ("Sewing: A man sits. He sews. well.", " one "),
        ("Sewing: A man sits. He sews. well.", " two"),
    ],
}
PROMPTS |= {"arc_challenge": PROMPTS["arc_easy"], "piqa": PROMPTS["arc_easy"]}


@pytest.mark.parametrize("task", TASKS)
def test_published_and_plain_records_are_asked_alike(task, tmp_path):
    question, texts = PLAIN[task]
    plain = {"id": 3, "question": question, "choices": texts, "answer": 1}
    plain |= {"passage": "It is."} if task == "boolq" else {}
    found = read_questions(write(tmp_path / f"{task}.jsonl", PUBLISHED[task], plain), task)
    first, second = found.questions
    assert list(first.pairs) == PROMPTS[task]
    assert first.answer == 1
    assert dataclasses.replace(second, where=first.where) == first
    assert first.where.endswith("line 1") and second.where.endswith("line 2")
    assert found.notes == () and found.first(1).questions == (first,)
    assert task_from_name(tmp_path / f"{task.replace('_', '-').upper()}.jsonl.gz") == task


def test_questions_of_boolq_without_passages_are_noted(tmp_path):
    path = write(
        tmp_path / "x.jsonl", {"question": "is it?", "choices": ["no", "yes"], "answer": 0}
    )
    found = read_questions(path, "boolq")
    assert found.questions[0].pairs[0] == ("Question: is it?\nAnswer:", " no")
    assert "without their passages" in found.notes[0]


def test_wrong_files_are_errors_that_name_the_line(tmp_path):
    good = PUBLISHED["arc_easy"]
    plain = {"question": "What?", "choices": ["one", "two"], "answer": 1}
    bad = {
        '"answer" is 2; expected one of 0, 1': plain | {"answer": 2},
        '"answer" is True; expected one of 0, 1': plain | {"answer": True},
        '"question" is 5; expected text': plain | {"question": 5},
        "expected 2 or more, not empty": plain | {"choices": ["", "a"]},
        '"choices" is [1]; expected a list of texts': plain | {"choices": [1]},
        "\"answerKey\" is 'C'; expected one of 1, 2": good | {"answerKey": "C"},
        '"choices" is 3; expected a list of texts as "text"': good | {"choices": 3},
        "expected a question": plain | {"question": " "},
    }
    for message, record in bad.items():
        path = write(tmp_path / "bad.jsonl", good, record)
        with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: ") as caught:
            read_questions(path, "arc_easy")
        assert message in str(caught.value)
    path = write(tmp_path / "bad.jsonl", PUBLISHED["winogrande"] | {"sentence": "No blank."})
    with pytest.raises(ValueError, match="a question with a _ for the choice"):
        read_questions(path, "winogrande")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file \(questions"):
        read_questions(tmp_path / "none.jsonl", "piqa")
    with pytest.raises(KeyError, match="no task 'arc'; expected one of arc_challenge, arc_easy"):
        read_questions(path, "arc")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Writes files of two tasks, whose letters are tokens of the tiny model."""
    directory = tmp_path_factory.mktemp("sets")
    letters = "abcdefghij"
    asked = [
        {"question": f"{a}?", "choices": [b, a, a + b], "answer": i % 3}
        for i, (a, b) in enumerate(itertools.pairwise(letters))
    ]
    write(directory / "openbookqa.jsonl", *asked)
    winogrande = [PUBLISHED["winogrande"] | {"answer": a} for a in "12"]
    write(directory / "winogrande.jsonl", *winogrande)
    (directory / "notes.txt").write_text("no questions")
    return directory


def test_accuracies_are_those_of_the_scores(tiny, sets):
    opened = open_model(str(tiny))
    config, params, tokenizer = opened.config, opened.params(), opened.tokenizer()
    questions = read_questions(sets / "openbookqa.jsonl", "openbookqa")
    found = multiple_choice.evaluate(config, params, tokenizer, questions, batch_size=5)
    right = {"acc": 0, "acc_norm": 0}
    for row, question in zip(found["rows"], questions.questions, strict=True):
        pairs = [multiple_choice.tokenize_pair(tokenizer, *pair) for pair in question.pairs]
        expected = [alone(config, params, pair, 48)[0] for pair in pairs]
        np.testing.assert_allclose(row["log_likelihoods"], expected, atol=1e-4)
        lengths = [len(text) for text in question.choices]
        right["acc"] += int(np.argmax(expected)) == question.answer
        right["acc_norm"] += int(np.argmax(np.divide(expected, lengths))) == question.answer
    n = len(questions.questions)
    for name, count in right.items():
        p = count / n
        assert found["metrics"][name]["value"] == pytest.approx(p)
        assert found["metrics"][name]["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))
    one = multiple_choice.evaluate(config, params, tokenizer, questions.first(1))
    assert one["metrics"]["acc"]["stderr"] is None
    assert found["protocol"]["truncated"] == 0
    short = multiple_choice.evaluate(config, params, tokenizer, questions, max_length=3)
    assert short["protocol"]["truncated"] == n  # "a? ab" is five tokens, of which four count


def test_evaluate_choices(tiny, sets, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    result = run("evaluate-choices", tiny, "--data", sets, "--json", "--out", out)
    found = json.loads(result.stdout)
    assert [s["task"] for s in found["sets"]] == ["openbookqa", "winogrande"]
    assert set(found["sets"][0]["metrics"]) == {"acc", "acc_norm", "acc_bytes"}
    # The choice of the first question of winogrande is wrong where that of the second is right.
    assert found["sets"][1]["metrics"] == {"acc": {"value": 0.5, "stderr": 0.5}}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == sum(s["protocol"]["questions"] for s in found["sets"])
    assert sum(row["right"]["acc"] for row in rows[:9]) / 9 == pytest.approx(
        found["sets"][0]["metrics"]["acc"]["value"]
    )
    how = ("--task", "openbookqa", "--limit", 2, "--batch", 1)
    shown = run("evaluate-choices", tiny, "--data", sets / "openbookqa.jsonl", *how)
    assert "(2 questions)" in shown.stdout and "acc_norm" in shown.stdout


def test_wrong_flags_of_evaluate_choices(tiny, sets, tmp_path):
    other = write(tmp_path / "mine.jsonl", PUBLISHED["piqa"])
    write(tmp_path / "siqa.jsonl", PUBLISHED["social_iqa"])
    write(tmp_path / "social_i_qa.jsonl", PUBLISHED["social_iqa"])
    (tmp_path / "empty").mkdir()
    bad = [
        ([tmp_path / "none"], "none: no such file or directory (--data)"),
        ([sets, "--task", "arc"], "--task arc: no such task; expected one of arc_challenge"),
        ([sets, "--task", "piqa"], "has no file piqa.jsonl"),
        ([other], "mine.jsonl: name its task with --task"),
        ([other, "--task", "piqa", "--task", "boolq"], "mine.jsonl: name its task"),
        ([tmp_path], "two files of task social_iqa"),
        ([tmp_path / "empty"], "has no .jsonl file that is named after a task"),
        ([other, "--task", "boolq"], "mine.jsonl, line 1: "),
        ([sets, "--max-length", 65], "sequences of 65 tokens; expected"),
        ([sets, "--out", other], "mine.jsonl: exists"),
        ([sets, "--limit", 0], "0 is not in the range"),
    ]
    for arguments, message in bad:
        fails(message, "evaluate-choices", tiny, "--data", *arguments)
    fails("no model", "evaluate-choices", tmp_path / "no model", "--data", sets)
