"""Where a model stops and how it samples, by its own files."""

import json
import math

import pytest
from chats import CHATML, make_tokenizer

from lordjax.generation.defaults import defaults_of, stop_tokens
from lordjax.generation.sampling import GREEDY, Sampling

LLAMA3 = {"eos_token_id": [128001, 128008, 128009], "do_sample": True, "temperature": 0.6}


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, {}, ()),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": [1, 106]}, {}, (1, 106)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 7]}, (5, 7)),  # the file made for it wins
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": -1}, {}, ()),
        ({"text_config": {"eos_token_id": 106}}, {}, (106,)),
    ],
)
def test_end_tokens_of_both_files(config, generation, ends):
    assert defaults_of(config, generation).ends == ends


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({}, GREEDY),
        ({"temperature": 0.7, "top_p": 0.9}, GREEDY),  # not sampled, as in transformers
        (LLAMA3, Sampling(0.6, top_k=50)),
        ({"do_sample": True, "top_k": 0, "top_p": 0.8}, Sampling(1.0, None, 0.8)),
        ({"repetition_penalty": 1.05}, Sampling(repetition_penalty=1.05)),
    ],
)
def test_sampling_is_that_of_transformers(generation, sampling):
    assert defaults_of({}, generation).sampling == sampling


def test_what_is_not_followed_is_named_and_what_does_nothing_is_not():
    neutral = {"num_beams": 1, "min_p": 0.0, "bad_words_ids": None, "typical_p": 1.0}
    assert defaults_of({}, neutral).not_followed == {}
    strange = {"num_beams": 4, "suppress_tokens": [3], "unheard_of": 1}
    assert defaults_of({}, strange).not_followed == {"num_beams": 4, "suppress_tokens": [3]}


def test_stop_strings():
    assert defaults_of({}, {"stop_strings": "###"}).stop_strings == ("###",)
    assert defaults_of({}, {"stop_strings": ["a", "b"]}).stop_strings == ("a", "b")


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "2"}, "\"eos_token_id\" is '2'; expected a token id or a list"),
        ({"eos_token_id": [2, None]}, '"eos_token_id" is [2, None]'),
        ({"eos_token_id": True}, '"eos_token_id" is True'),
        ({"do_sample": True, "temperature": "hot"}, "\"temperature\" is 'hot'; expected a number"),
        ({"do_sample": True, "temperature": math.nan}, '"temperature" is nan'),
        (
            {"do_sample": True, "top_p": 1.5},
            "generation_config.json: top_p 1.5: expected in (0, 1]",
        ),
        ({"repetition_penalty": 0}, "repetition_penalty 0: expected above 0"),
    ],
)
def test_wrong_values_are_named(generation, message):
    with pytest.raises(ValueError) as error:
        defaults_of({}, generation, "some/model")
    assert str(error.value).startswith("some/model, generation_config.json")
    assert message in str(error.value)


def test_the_token_that_a_template_writes_after_an_answer_ends_a_chat():
    """Though the tokenizer's own EOS token is another one, and no file names it."""
    tokenizer = make_tokenizer(CHATML)
    end = tokenizer.eos_token_id
    tokenizer.eos_token = "<s>"
    defaults = defaults_of({"eos_token_id": 9}, {})
    assert stop_tokens(defaults, tokenizer) == sorted({9, tokenizer.eos_token_id})
    assert stop_tokens(defaults, tokenizer, chat=True) == sorted({9, tokenizer.eos_token_id, end})


def test_text_after_an_answer_ends_nothing():
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    defaults = defaults_of({}, {})
    assert stop_tokens(defaults, tokenizer, chat=True) == stop_tokens(defaults, tokenizer)


def test_transformers_agrees_on_the_end_tokens(tmp_path):
    from transformers import GenerationConfig

    (tmp_path / "generation_config.json").write_text(json.dumps(LLAMA3))
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert defaults_of({}, LLAMA3).ends == tuple(theirs.eos_token_id)
