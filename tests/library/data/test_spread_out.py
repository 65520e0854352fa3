"""Windows from as many documents, and as many places of a document, as possible."""

import json

import numpy as np
import pytest
from test_token_windows import VOCAB, Bytes, load, texts

from lordjax.data.documents import Corpus, documents
from lordjax.data.spread_out import FLOOR
from lordjax.data.token_windows import load_windows


def spread(path, **options):
    return load(path, spread=True, **options)


def letters(tmp_path, lengths):
    """One document per length, each of one letter."""
    for i, length in enumerate(lengths):
        (tmp_path / f"{i:03}.txt").write_text(chr(97 + i) * length)
    return tmp_path


def counts(tokens):
    ids, found = np.unique(tokens[tokens != 0], return_counts=True)
    return {chr(i): int(n) for i, n in zip(ids, found, strict=True)}


def test_no_document_gives_more_than_its_share(tmp_path):
    found = counts(spread(letters(tmp_path, [9000] * 8), seq_len=512, samples=16))
    assert len(found) == 8
    assert max(found.values()) <= 512 * 16 / 8


def test_a_document_may_always_give_the_floor(tmp_path):
    """Only as many of the documents are tokenized as are needed, each to the floor."""
    letters(tmp_path, [9000] * 26)
    tokenizer = Bytes()
    found = spread(tmp_path, seq_len=FLOOR, samples=4, tokenizer=tokenizer)
    assert max(counts(found).values()) == FLOOR
    assert len(tokenizer.calls) == 4
    assert max(map(len, tokenizer.calls)) < 9000


def test_the_limit_gives_way_where_the_text_would_be_short(tmp_path):
    found = spread(letters(tmp_path, [50] * 9 + [5000]), seq_len=128, samples=32)
    assert found.shape == (32, 128)
    assert set(counts(found)) == set("abcdefghij")
    # All of the text is used where there is no more of it than is wanted.
    assert spread(tmp_path, seq_len=128, samples=1000).shape == (42, 128)


@pytest.mark.parametrize("samples", [4, 16])
def test_windows_of_one_file_are_spread_over_it(tmp_path, samples):
    lines = "".join(f"{i:07}\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(lines)
    tokenizer = Bytes()
    found = spread(tmp_path / "a.txt", seq_len=64, samples=samples, tokenizer=tokenizer)
    rows = [bytes(row.astype(np.uint8)).decode() for row in found]
    assert all(row in lines and row.endswith("\n") for row in rows)  # no separators, whole lines
    places = np.array([int(row[:7]) for row in rows])
    np.testing.assert_allclose(places, np.arange(samples) * 20_000 / samples, atol=2)
    assert sum(map(len, tokenizer.calls)) < len(lines) / 2


def test_a_short_file_gives_all_of_its_windows(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    np.testing.assert_array_equal(
        spread(tmp_path / "a.txt", samples=50), load(tmp_path / "a.txt", samples=50)
    )
    assert [texts(row) for row in spread(tmp_path / "a.txt", samples=3)] == [
        b"abcd",
        b"ijkl",
        b"rstu",
    ]


def test_long_documents_among_few_are_spread_too(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{i:06}\n" for i in range(4000)))
    found = texts(spread(tmp_path, seq_len=64, samples=16))
    places = [int(found[i + 1 : i + 7]) for i in range(len(found) - 7) if found[i : i + 1] == b"b"]
    assert min(places) < 10 and max(places) > 3000


def test_explicit_limits_and_arrays_are_as_they_were(tmp_path):
    letters(tmp_path, [100] * 3)
    for options in ({"document_tokens": 10}, {"document_tokens": 60, "seed": 3}):
        given = {"samples": 4, "seq_len": 8, **options}
        np.testing.assert_array_equal(spread(tmp_path, **given), load(tmp_path, **given))
    np.save(tmp_path / "a.npy", np.arange(40).reshape(4, 10))
    given = {"samples": 2, "tokenizer": None, "seq_len": 8}
    np.testing.assert_array_equal(
        spread(tmp_path / "a.npy", **given), load(tmp_path / "a.npy", **given)
    )


def test_the_seed_chooses_the_documents(tmp_path):
    letters(tmp_path, [FLOOR] * 26)
    drawn = [texts(spread(tmp_path, samples=8, seq_len=64, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_corpus_holds_the_documents_in_order(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    text = "\ufeff" + '{"text": "tw\u2028o"}\n\n  \n{"text": "three", "n": 1}\n{"text": ""}'
    (tmp_path / "b.jsonl").write_text(text)
    (tmp_path / "c.py").write_text("four")
    corpus = Corpus.of(tmp_path)
    assert [corpus.text(i) for i in range(len(corpus))] == list(documents(tmp_path))
    assert len(corpus) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x"}', r'line 2: no "text"'),
        (b"abc", r"line 2: not JSON"),
        (b'{"text": "\xe9"}', r"a\.jsonl: byte 0xe9 at offset 27 is not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abcd"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        spread(tmp_path / "a.jsonl", samples=9)


def test_documents_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "abcd"}) + "\n" for _ in range(5))
    )
    given = {"tokenizer": Bytes(), "seq_len": 4, "vocab_size": VOCAB}
    assert load_windows(tmp_path / "a.jsonl", **given).documents == 5
    assert load_windows(tmp_path / "a.jsonl", **given, samples=2, spread=True).documents == 2
    np.save(tmp_path / "a.npy", np.zeros((2, 4), int))
    assert load_windows(tmp_path / "a.npy", **given).documents is None


def test_empty_text_and_a_missing_number(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text("\n")
    for name in ("a.txt", "b.jsonl"):
        with pytest.raises(ValueError, match="no text; all documents are empty"):
            spread(tmp_path / name, samples=2)
    with pytest.raises(ValueError, match="only if samples says how many"):
        spread(tmp_path / "a.txt")
