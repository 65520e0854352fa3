"""Our models in the LM evaluation harness: its tasks, its tokenisation, its own model class."""

import importlib.metadata
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from questions import PUBLISHED, alone, tokenizer_of, write

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install lordjax[eval])")

from lordjax.evaluate import multiple_choice
from lordjax.evaluate.choice_tasks import TASKS, read_questions
from lordjax.generation.completion import complete
from lordjax.generation.sampling import Sampling
from lordjax.scripts.opened_model import open_model

FILES = {  # of the harness's tasks
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
}
# Warnings of the harness and of what it imports are not ours.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        from lordjax.scripts import harness

        yield harness


@pytest.fixture(scope="module")
def model(tiny, harness):
    return harness.LordjaxLM(str(tiny), batch_size=4)


def requests(*arguments):
    return [SimpleNamespace(args=a) for a in arguments]


def records(task):
    """A few that differ."""
    record = PUBLISHED[task]
    for i in range(3):
        yield json.loads(json.dumps(record).replace("What", f"Wh{'aeo'[i]}t").replace("He", "Hi"))


def task_file(directory, task, data):
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks" / FILES[task]
    names = ("acc", "acc_norm", "acc_bytes") if TASKS[task].normalised else ("acc",)
    mean = {"aggregation": "mean", "higher_is_better": True}
    changes = {
        "task": f"small_{task}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "metric_list": [{"metric": name, **mean} for name in names],
    }
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in changes.items()]
    (directory / f"small_{task}.yaml").write_text(f"include: {shipped}\n" + "".join(lines))


def test_the_harness_and_evaluate_choices_agree_on_every_question(model, tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    for task in FILES:
        data = write(tmp_path / f"{task}.jsonl", *records(task))
        task_file(tmp_path, task, data)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"small_{task}" for task in FILES],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=10,  # none is needed of a mean, but 0 leaves standard errors out
    )
    for task in FILES:
        questions = read_questions(tmp_path / f"{task}.jsonl", task)
        given = model.config, model.params, model.tokenizer
        ours = multiple_choice.evaluate(*given, questions, batch_size=4)
        samples = sorted(found["samples"][f"small_{task}"], key=lambda s: s["doc_id"])
        for sample, row, question in zip(samples, ours["rows"], questions.questions, strict=True):
            assert [tuple(pair) for pair in sample["arguments"]] == list(question.pairs)
            scores = [response[0][0] for response in sample["resps"]]
            np.testing.assert_allclose(scores, row["log_likelihoods"], atol=1e-4)
        for name, metric in ours["metrics"].items():
            results = found["results"][f"small_{task}"]
            assert results[f"{name},none"] == metric["value"]
            assert results[f"{name}_stderr,none"] == pytest.approx(metric["stderr"])


@pytest.mark.parametrize("special", [{"eos_token": "<end>"}, {"bos_token": "<s>"}])
def test_texts_are_encoded_as_the_harness_does(harness, special):
    from lm_eval.api.model import TemplateLM

    tokenizer = tokenizer_of("the cat sat on the mat", **special)
    seen = []
    stub = SimpleNamespace(
        backend="causal",
        prefix_token_id=multiple_choice.prefix_token(tokenizer),
        tok_encode=lambda text, **how: harness.LordjaxLM.tok_encode(stub, text, **how),
        tokenizer=tokenizer,
        _encode_pair=lambda *pair: TemplateLM._encode_pair(stub, *pair),
        _loglikelihood_tokens=lambda pairs, **how: seen.extend(pairs),
    )
    begun = next(iter(special.values())) + "the"
    texts = ["", "the", "the ", "the  ", "cat", " sat on", "th", "e", begun]
    pairs = [(a, b) for a in texts for b in texts if b.strip()]
    TemplateLM.loglikelihood(stub, requests(*pairs), disable_tqdm=True)
    assert len(seen) == len(pairs)
    for pair, start, rest in seen:
        assert (start, rest) == multiple_choice.tokenize_pair(tokenizer, *pair), pair


def test_scores_are_those_of_the_harness_s_own_class(tiny, model):
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    other = HFLM(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(tiny),
        batch_size=4,
        device="cpu",
    )
    long = "def f(x): return x " * 8  # longer than the model's longest sequence
    pairs = [("a", "b"), ("a b", " c"), ("", "xyz"), (long, " end"), ("a", "b" * 30), ("a", "bc")]
    expected = other.loglikelihood(requests(*pairs), disable_tqdm=True)
    found = model.loglikelihood(requests(*pairs), disable_tqdm=True)
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], atol=1e-3)
    assert [f[1] for f in found] == [e[1] for e in expected]
    texts = requests(("ab",), (long,), (long * 2,))
    np.testing.assert_allclose(
        model.loglikelihood_rolling(texts, disable_tqdm=True),
        other.loglikelihood_rolling(texts, disable_tqdm=True),
        atol=1e-3,
    )
    asked = requests(
        ("ab", {"until": ["\n"], "max_gen_toks": 8}),
        (long, {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}),
        ("abc", {"until": "\n", "max_gen_toks": 4}),
    )
    answers = model.generate_until(asked, disable_tqdm=True)
    assert answers == other.generate_until(asked, disable_tqdm=True)
    assert other.max_length == model.max_length and other.eot_token_id == model.eot_token_id


def test_a_text_is_scored_once_whatever_its_windows(model):
    ids = model.tok_encode("x" * 100)
    (found,) = model.loglikelihood_rolling(requests(("x" * 100,)), disable_tqdm=True)
    end, most = model.eot_token_id, model.max_length
    first, _ = alone(model.config, model.params, ([end], ids[:most]))
    # The second window has a full context, of which only what is left is scored.
    context = ids[len(ids) - most - 1 : most]
    second, _ = alone(model.config, model.params, (context, ids[most:]))
    assert found == pytest.approx(first + second, abs=1e-3)
    assert model.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0.0]


def test_generation_settings(harness, model):
    read = harness.generation
    assert read({"until": "x"}, 9) == (Sampling(), ["x"], 9)
    assert read({"until": ["", "x"], "max_tokens": 3}, 9) == (Sampling(), ["x"], 3)
    assert read({"do_sample": False, "temperature": 0.7}, 9)[0] == Sampling()
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 4, "top_p": 0.9}
    assert read(drawn, 9)[0] == Sampling(0.5, 4, 0.9)
    assert read({"do_sample": True}, 9)[0] == Sampling(1.0)
    with pytest.raises(ValueError, match="generation settings num_beams are not known"):
        read({"num_beams": 4}, 9)
    with pytest.raises(ValueError, match="answers of 64 tokens, but the model's longest"):
        model.generate_until(requests(("a", {"max_gen_toks": 64})), disable_tqdm=True)
    given = model.params, model.config, model.tokenizer
    (text,) = model.generate_until(requests(("ab", {"max_gen_toks": 8})), disable_tqdm=True)
    assert text == complete(*given, ["ab"], max_new_tokens=8)[0].text


def test_results_are_cached(model, tmp_path):
    from lm_eval.api.model import CacheHook, CachingLM

    asked = requests(("a", " b"), ("a", " c"))
    plain = model.loglikelihood(asked, disable_tqdm=True)
    try:
        cached = CachingLM(model, str(tmp_path / "cache.db"))
        assert cached.loglikelihood(asked) == plain
        model._scores = None  # nothing is computed again
        assert cached.loglikelihood(asked) == plain
    finally:
        del model._scores
        model.set_cache_hook(CacheHook(None))


def test_wrong_arguments(harness, tiny, tmp_path):
    with pytest.raises(ValueError, match="batch_size 'many'; expected a number, or auto"):
        harness.LordjaxLM(str(tiny), batch_size="many")
    with pytest.raises(FileNotFoundError):
        harness.LordjaxLM(str(tmp_path / "none"))
    # What the harness's command gives to every model.
    made = harness.LordjaxLM(str(tiny), "auto:4", device="cuda:0", max_batch_size=8)
    assert made.batch_size == 16


def test_the_harness_finds_the_model_by_its_name(harness, tiny):
    from lm_eval.api.registry import get_model

    assert get_model("lordjax") is harness.LordjaxLM
    assert get_model("hf").__name__ == "HFLM"  # and still its own
    made = get_model("lordjax").create_from_arg_string(f"pretrained={tiny},max_length=32")
    assert made.max_length == 32 and made.tok_encode("ab") == open_model(
        str(tiny)
    ).tokenizer().encode("ab")


def test_the_entry_point_is_the_class(harness):
    points = importlib.metadata.entry_points(group="lm_eval.models", name="lordjax")
    assert points, "installed before there was an entry point (pip install -e . again)"
    assert next(iter(points)).load() is harness.LordjaxLM


def test_the_harness_s_command_with_our_model(harness, tiny, tmp_path, monkeypatch, capsys):
    data = write(tmp_path / "piqa.jsonl", *records("piqa"))
    task_file(tmp_path, "piqa", data)
    command = ["lm_eval", "--model", "lordjax", "--model_args", f"pretrained={tiny}"]
    command += ["--tasks", "small_piqa", "--include_path", str(tmp_path), "--batch_size", "4"]
    monkeypatch.setattr(sys, "argv", command)
    harness.main()
    shown = capsys.readouterr().out
    assert "small_piqa" in shown and "acc_norm" in shown


def test_run_as_a_file_it_is_the_harness_s_command():
    command = [sys.executable, "-m", "lordjax.scripts.harness", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "lm-eval run" in done.stdout
