"""A BOS token that a person types is not doubled."""

import pytest
from chats import CHATML, make_tokenizer

from lordjax.generation.chat_turns import chat_ids
from lordjax.generation.completion import encode, tokenize


def test_a_typed_bos_is_one_token():
    tokenizer = make_tokenizer(begin=True)
    bos = tokenizer.bos_token_id
    plain = tokenize(tokenizer, "hello")
    assert plain[0] == bos and plain.count(bos) == 1
    assert tokenize(tokenizer, "<s>hello") == plain
    assert encode(tokenizer, "<s>hello", special=True)[:2] == [bos, bos]
    assert encode(tokenizer, "hello", special=False) == plain[1:]
    assert tokenize(tokenizer, "") == [bos]


def test_a_template_that_writes_a_bos_gets_no_second_one():
    tokenizer = make_tokenizer("<s>" + CHATML, begin=True)
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hi"}], "model")
    assert ids.count(tokenizer.bos_token_id) == 1
    with pytest.raises(ValueError, match="model: the tokenizer has no chat template"):
        chat_ids(make_tokenizer(None), [], "model")
