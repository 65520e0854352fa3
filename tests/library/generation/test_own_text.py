"""A model's own text: drawn at temperature 1, document after document, window by window."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from blocks import BLOCKS, random_model, source
from chats import CHATML, SPECIAL, make_tokenizer
from interrupted import CONFIG

from lordjax.generation.own_text import Turns, Writing, write_windows, writing_of
from lordjax.models import Rope, Transformer

BLOCK = "gemma2"  # with sliding windows
END, LENGTH = frozenset({3, 4, 5, 6}), 32
FIRST = np.arange(10, 20)
PLAIN = Writing(FIRST, END)
CHAT = Writing(FIRST, END, frozenset({7}), Turns((1, 2), (7, 8), (3, 9)))


@functools.cache
def windows(how=None, numbers=(0, 1, 2, 3), seed=0, length=LENGTH, block=BLOCK):
    model = source(block)
    how = CHAT if how == "chat" else PLAIN
    return write_windows(model.config, model.params, how, numbers, length=length, seed=seed)


def documents(row, stops=END):
    """Starts and ends of a window's documents."""
    ends = [i + 1 for i, token in enumerate(row.tolist()) if token in stops]
    return list(zip([0, *ends], [*ends, len(row)], strict=True))


def test_windows_are_full_and_documents_start_as_they_should():
    found = windows()
    assert found.shape == (4, LENGTH) and found.dtype == np.int32
    assert found.min() >= 0 and found.max() < source(BLOCK).config.vocab_size
    starts = [row[start] for row in found for start, end in documents(row) if start < end]
    assert len(starts) > 8  # several documents in a window
    assert set(starts) <= set(FIRST) and len(set(starts)) > 1


def drawn_from_its_document_alone(model, row, number, first=1, stops=END):
    """Checks each token: it is the draw from the logits of one pass over its document, uncached.

    Returns the number of checked tokens.
    """
    apply = jax.jit(lambda ids: Transformer(model.config).apply({"params": model.params}, ids))
    key, checked = jax.random.fold_in(jax.random.key(0), number), 0
    for start, end in documents(row, stops):
        padded = np.zeros((1, len(row)), np.int32)
        padded[0, : end - start] = row[start:end]
        logits = apply(padded)[0]
        for i in range(start + first, end):
            drawn = jax.random.categorical(jax.random.fold_in(key, i - 1), logits[i - start - 1])
            assert int(drawn) == row[i]
            checked += 1
    return checked


@pytest.mark.parametrize("block", ["gemma2", "gpt2"])
def test_a_token_is_drawn_at_temperature_1_given_its_document_alone(block):
    rows = windows(block=block)[:2]
    checked = [drawn_from_its_document_alone(source(block), row, i) for i, row in enumerate(rows)]
    assert sum(checked) > LENGTH


def test_a_long_document_is_drawn_given_all_of_it():
    """The cache grows while it is written."""
    model = random_model(dataclasses.replace(CONFIG, max_positions=300))
    endless = Writing(FIRST, frozenset())
    row = write_windows(model.config, model.params, endless, [5], length=300)[0]
    assert drawn_from_its_document_alone(model, row, 5, first=120, stops=()) == 180


def test_ids_depend_on_the_seed_and_the_number_only():
    found = windows()
    np.testing.assert_array_equal(found, windows.__wrapped__())
    np.testing.assert_array_equal(found[[3, 1]], windows(numbers=(3, 1)))
    assert not np.array_equal(found, windows(seed=1))
    assert len({row.tobytes() for row in found}) == 4


def test_every_second_window_of_a_chat_model_holds_conversations():
    found, plain = windows("chat", length=48), windows(length=48)
    np.testing.assert_array_equal(found[::2], plain[::2])
    turns = 0
    for row in found[1::2].tolist():
        while row:
            # A token that ends a text gives way to what follows: 7 here, then 3, and no other end.
            for part in (CHAT.turns.opening, CHAT.turns.change, CHAT.turns.closing):
                asked = part != CHAT.turns.opening
                at = row.index(part[0]) if asked and part[0] in row else len(row) * asked
                assert not END & set(row[:at])
                assert row[at : at + len(part)] == list(part)[: len(row) - at]
                row = row[at + len(part) :]
            turns += 1
    assert turns > 2


def test_how_documents_of_a_tokenizer_start():
    tokenizer = make_tokenizer(template=None)
    special = set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    how = writing_of(tokenizer, 300, ends=[5])
    assert not special & set(how.first.tolist()) and len(how.first) == 257
    assert how.ends == {tokenizer.eos_token_id, 5} and how.turns is None
    assert max(writing_of(tokenizer, 100).first) == 99
    begun = writing_of(make_tokenizer(template=None, begin=True), 300)
    assert begun.first.tolist() == [tokenizer.bos_token_id]


def test_the_parts_of_a_template():
    tokenizer = make_tokenizer()
    turns = writing_of(tokenizer, 300).turns
    assert [tokenizer.decode(part) for part in turns] == [
        "<|user|>",
        "<|end|>\n<|assistant|>",
        "<|end|>\n",
    ]
    twice = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}")
    assert writing_of(make_tokenizer(twice), 300).turns is None


def test_bad_lengths_and_models():
    model = source(BLOCK)
    most = model.config.max_positions
    with pytest.raises(ValueError, match=f"longest sequence is {most}"):
        write_windows(model.config, model.params, PLAIN, [0], length=most + 1)
    encoder = next(name for name, config in BLOCKS.items() if config.head == "masked")
    with pytest.raises(ValueError, match="does not generate text"):
        write_windows(source(encoder).config, {}, PLAIN, [0], length=8)


@pytest.mark.full
def test_a_document_that_outgrows_the_trained_length_is_drawn_at_its_own_length():
    """LongRoPE: neighbours and the window's length do not change the draws."""
    stretch = {"short_factor": (1.0,) * 4, "long_factor": (2.0, 3.0, 4.0, 5.0), "factor": 2.0}
    rope = Rope(kind="longrope", original_max_positions=20, **stretch)
    config = dataclasses.replace(BLOCKS["starcoder2"], windows=None, rope=rope)
    model, endless = random_model(config), Writing(FIRST, frozenset())
    short, long = (
        write_windows(model.config, model.params, endless, numbers, length=length)
        for numbers, length in (([0], 30), ([0, 1], 40))
    )
    np.testing.assert_array_equal(short[0], long[0, :30])
    key = jax.random.fold_in(jax.random.key(0), 0)
    for i in (18, 19, 20, 21, 30):  # predicted from i tokens
        logits = Transformer(config).apply({"params": model.params}, long[:1, :i])[0, -1]
        assert int(jax.random.categorical(jax.random.fold_in(key, i - 1), logits)) == long[0, i]
