"""Examples: their order, held-out documents, padding and checks."""

import numpy as np
import pytest
from chats import CONFIG, VOCAB, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lordjax.data.examples import (
    Examples,
    batch_indices,
    check,
    fingerprint,
    packed,
    pad,
    split_documents,
)
from lordjax.models import objective

# --- order ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 9))
def test_an_epoch_reads_every_example_once(count, batch, seed):
    steps = -(-3 * count // batch)
    # Backwards: no step needs those before it.
    stream = [batch_indices(count, batch, k, seed) for k in reversed(range(steps))][::-1]
    assert all(len(part) == batch for part in stream)
    epochs = np.concatenate(stream)[: 3 * count].reshape(3, count)
    for e, epoch in enumerate(epochs):
        np.testing.assert_array_equal(epoch, np.random.default_rng([seed, e]).permutation(count))


def test_epochs_and_seeds_have_other_orders():
    orders = {tuple(batch_indices(50, 50, k, seed)) for k in range(3) for seed in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("wrong", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)])
def test_bad_positions(wrong):
    with pytest.raises(ValueError, match="expected 1 or more examples"):
        batch_indices(*wrong)


# --- containers ----------------------------------------------------------------------------------


def test_rows_and_fingerprint():
    tokens = np.arange(6, dtype=np.int32).reshape(3, 2)
    plain = Examples(tokens, tokens)
    logs = -0.5 - np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 16
    whole = Examples(tokens, tokens, tokens > 1, tokens % 2, tokens[..., None], logs)
    assert whole.size == 3
    chosen = whole.rows(np.array([2, 0]))
    np.testing.assert_array_equal(chosen.tokens, tokens[[2, 0]])
    np.testing.assert_array_equal(chosen.mask, [[True, True], [False, False]])
    assert plain.rows(np.array([True, False, True])).token_types is None
    others = [plain, whole, chosen, *(whole._replace(**{n: getattr(whole, n) * 0}) for n in fields)]
    prints = [fingerprint(e) for e in others]
    assert len(set(prints)) == len(prints)
    assert fingerprint(whole.rows(np.arange(3))) == fingerprint(whole)


fields = Examples._fields


@pytest.mark.parametrize(("longest", "length"), [(3, 64), (64, 64), (65, 100), (130, 100)])
def test_rows_are_filled_up_to_a_multiple(longest, length):
    tokens, mask = pad([[5] * longest, [6, 7]], 100)
    assert tokens.shape == (2, length)
    assert list(tokens[1][:3]) == [6, 7, 0]
    assert mask.sum(axis=1).tolist() == [min(longest, length), 2]
    assert pad([[5] * 64] * 2, 100)[1] is None


def test_examples_that_a_model_cannot_read():
    tokens = np.full((2, 4), 7, np.int32)
    good = Examples(tokens, tokens)
    check(CONFIG, good)
    for bad, message in [
        (Examples(np.full((1, 513), 7), np.full((1, 513), 7)), "513 tokens.*512.*--seq-len"),
        (good._replace(tokens=tokens + VOCAB), "token id 307 at window 0"),
        (good._replace(targets=tokens + VOCAB), "target 307; expected 0 to 299"),
        (good._replace(targets=tokens[:, :1]), "head 'causal'; expected a token id per position"),
        (good._replace(token_types=tokens), "token type 7; expected less than 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            check(CONFIG, bad)


# --- split ---------------------------------------------------------------------------------------


def held(texts, **options):
    chosen = split_documents(texts, **options)
    return {text for text, h in zip(texts, chosen, strict=True) if h}


def test_a_document_is_held_out_wherever_it_stands():
    texts = [f"document {i}" for i in range(1000)]
    first = held(texts)
    assert 20 < len(first) < 90
    assert held(texts[::-1]) == first
    assert held(texts[:700]) == first & set(texts[:700])
    assert held([text.encode() for text in texts]) == {text.encode() for text in first}
    assert not np.any(split_documents(texts, share=0))
    assert len(held(texts, seed=1) & first) < len(first) / 2
    assert first < held(texts, share=0.1)


def test_equal_documents_stay_together_and_one_is_held_out_at_least():
    for share in (1e-6, 0.5, 0.999999):
        chosen = split_documents(["a", "b", "a", "b", "c"], share=share)
        assert chosen[0] == chosen[2]
        assert chosen[1] == chosen[3]
        assert 0 < chosen.sum() < 5


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "a"]])
def test_nothing_to_hold_out(texts):
    with pytest.raises(ValueError, match=r"not two different ones.*validation share of 0"):
        split_documents(texts)
    with pytest.raises(ValueError, match=r"share 1\.5"):
        split_documents(texts, share=1.5)


# --- packed text ---------------------------------------------------------------------------------


def pack(path, **options):
    return packed(path, make_tokenizer(), **{"seq_len": 8, "vocab_size": VOCAB} | options)


def letters(examples):
    """Returns the letters in the documents of one side of the split."""
    return set(make_tokenizer().decode(examples.tokens.ravel()).replace("<|end|>", ""))


def test_no_document_is_in_both_parts(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(chr(65 + i) * 20)
    data = pack(tmp_path, share=0.3)
    parts = [letters(part) for part in data[:2]]
    assert not parts[0] & parts[1]
    assert all(parts)
    documents = data.facts["documents"]
    assert sum(documents.values()) == 40
    assert documents["validation"] == len(parts[1])
    assert data.facts["examples"] == {"train": data.train.size, "validation": data.validation.size}
    # Under other names and in another order the same texts are held out.
    for i in range(40):
        (tmp_path / f"{i:02}.txt").rename(tmp_path / f"{99 - i}.md")
    again = pack(tmp_path, share=0.3)
    assert [letters(part) for part in again[:2]] == parts


def test_targets_of_packed_text_are_those_of_the_objective(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    train, validation, facts = pack(tmp_path, share=0)
    expected = objective.targets(CONFIG, train.tokens, None)
    np.testing.assert_array_equal(train.targets, expected)
    assert train.mask is None
    assert validation.size == 0
    assert facts["sha256"]["train"] == fingerprint(train)
    with pytest.raises(ValueError, match="1 document"):
        pack(tmp_path)


def test_rows_of_an_array_are_documents(tmp_path):
    rows = np.random.default_rng(0).integers(0, VOCAB, (30, 12))
    np.save(tmp_path / "a.npy", np.concatenate([rows, rows]))
    train, validation, _ = pack(tmp_path / "a.npy", share=0.2)
    sides = [{tuple(row) for row in part.tokens} for part in (train, validation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {tuple(row) for row in rows[:, :8]}
    assert train.size + validation.size == 60
