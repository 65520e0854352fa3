"""``generation_config.json``: commands follow it and keep it."""

import json
import shutil

import pytest
from commands import calibration, fails, run
from tiny_gguf import write

from lordjax.conversions.readers.gguf.special_tokens import generation_config
from lordjax.generation.completion import complete
from lordjax.generation.sampling import Sampling
from lordjax.scripts.opened_model import open_model

NAME = "generation_config.json"
PROMPT, NEW = "def f(x):", 16


@pytest.fixture(scope="module")
def free(tiny):
    """The tokens of an answer that nothing stops."""
    opened = open_model(str(tiny))
    found = complete(
        *(opened.arrays(), opened.config, opened.tokenizer(), [PROMPT]),
        max_new_tokens=NEW,
        stop_tokens=[],
    )
    text = found[0].text
    return text, opened.tokenizer()(text)["input_ids"]


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model, whose file a test may replace."""
    return shutil.copytree(tiny, tmp_path / "model")


def says(model, **content):
    (model / NAME).write_text(json.dumps(content))


def answer(model, *arguments):
    result = run("generate", model, PROMPT, "--max-new-tokens", NEW, "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def test_generate_stops_at_every_token_of_the_list(model, free):
    text, ids = free
    stop = ids[4]
    says(model, eos_token_id=[0, stop])
    assert answer(model)[0]["text"] == text[: ids.index(stop)]
    says(model, eos_token_id=0)
    assert answer(model)[0]["text"] == text


def test_generate_samples_as_the_file_says_and_flags_come_first(model):
    says(model, eos_token_id=0, do_sample=True, temperature=3.0, top_p=0.9, num_beams=3)
    found, said = answer(model)
    expected = {"temperature": 3.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.0}
    assert found["sampling"] == expected
    assert "num_beams to 3, which is not followed" in said
    opened = open_model(str(model))
    given = opened.arrays(), opened.config, opened.tokenizer()
    sampling = Sampling(3.0, top_k=50, top_p=0.9)
    same = complete(*given, [PROMPT], max_new_tokens=NEW, sampling=sampling, stop_tokens=[0])
    assert found["text"] == same[0].text
    greedy, _ = answer(model, "--temperature", 0)
    assert greedy["sampling"]["temperature"] == 0 and greedy["text"] != found["text"]


def test_a_damaged_file_is_named(model):
    (model / NAME).write_text("{")
    fails(NAME, "generate", model, PROMPT)
    says(model, eos_token_id="<end>")
    fails("expected a token id or a list", "generate", model, PROMPT)


def test_it_goes_along(model, text, tmp_path):
    content = {"eos_token_id": [0, 7], "do_sample": True, "top_p": 0.9, "something_new": [1]}
    says(model, **content)
    small, native, dense, factored = (
        tmp_path / name for name in ("small", "native", "dense", "factored")
    )
    assert run("compress", model, small, *calibration(text), "--method", "svd").exit_code == 0
    assert run("convert", small, native, "--to", "native").exit_code == 0
    assert run("export", native, dense, "--to", "dense").exit_code == 0
    assert run("export", native, factored, "--to", "factored").exit_code == 0
    for directory in (small, native, dense, factored):
        assert json.loads((directory / NAME).read_text()) == content
    assert open_model(str(small)).generation_defaults().ends == (0, 7)


@pytest.mark.full
def test_it_goes_along_without_a_tokenizer(model, tmp_path):
    for file in model.glob("*token*"):
        file.unlink()
    says(model, eos_token_id=[0, 7])
    assert run("convert", model, tmp_path / "out", "--to", "native").exit_code == 0
    assert json.loads((tmp_path / "out" / NAME).read_text()) == {"eos_token_id": [0, 7]}


def test_a_directory_without_the_file_gets_none(model, tmp_path):
    (model / NAME).unlink()
    assert run("convert", model, tmp_path / "out", "--to", "native").exit_code == 0
    assert not (tmp_path / "out" / NAME).exists()


def test_ends_of_a_gguf_file():
    """Of turns and messages to tools, too; and control tokens of known names."""
    tokens = ["<s>", "</s>", "<|im_end|>", "a", "<|eot_id|>"]
    meta = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1],  # the last is text that looks like one
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 3,
        "general.sampling.temp": 0.5,
    }
    found = generation_config(meta)
    assert found == {
        "bos_token_id": 0,
        "eos_token_id": [1, 3, 2],  # the EOS of the file first
        "do_sample": True,
        "temperature": 0.5,
    }


def test_a_converted_gguf_file_stops_where_it_did(tmp_path):
    path = write(tmp_path / "model.gguf")
    assert open_model(str(path)).generation_defaults().ends == (2,)
    assert run("convert", path, tmp_path / "out", "--to", "hf").exit_code == 0
    assert json.loads((tmp_path / "out" / NAME).read_text())["eos_token_id"] == [2]
