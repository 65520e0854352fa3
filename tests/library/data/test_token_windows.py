"""Token windows: which text is read, in which order, and errors for everything else."""

import hashlib
import json
import types

import numpy as np
import pytest

from lordjax.data.token_windows import array_length, fingerprint, load_tokens, standard_library

VOCAB = 256


class Bytes:
    """A tokenizer whose ids are the bytes of the text; byte 0 ends a text."""

    eos_token_id = 0

    def __init__(self):
        self.calls = []

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        self.calls.append(text)
        return list(text.encode())


def load(path, **options):
    options = {"tokenizer": Bytes(), "seq_len": 4, "vocab_size": VOCAB} | options
    return load_tokens(path, **options)


def texts(tokens):
    return bytes(tokens.astype(np.uint8).ravel())


def test_text_file_is_one_document_cut_into_windows(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    tokens = load(tmp_path / "a.txt")
    assert tokens.dtype == np.int32
    assert tokens.shape == (2, 4)
    assert texts(tokens) == b"abcdefgh"
    assert texts(load(str(tmp_path / "a.txt"), samples=1)) == b"abcd"


def test_samples_are_a_limit(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij")
    assert load(tmp_path / "a.txt", samples=50).shape == (2, 4)


def test_directory_is_read_in_sorted_order_without_foreign_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in [("b/x.py", "xx"), ("c.md", "cc"), ("a.txt", "aa")]:
        (tmp_path / name).write_text(text)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "lines.jsonl").write_text('{"text": "jj"}\n\n{"text": "kk", "n": 1}\n')
    (tmp_path / "image.png").write_bytes(b"\xff\xfe\x00")
    (tmp_path / ".git/h.txt").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert texts(load(tmp_path, seq_len=14)) == b"aa\0xx\0cc\0jj\0kk"


def test_documents_are_joined_by_line_breaks_without_an_end_token(tmp_path):
    (tmp_path / "a.txt").write_text("aa")
    (tmp_path / "b.txt").write_text("bb")
    plain = types.SimpleNamespace(encode=Bytes().encode)
    assert texts(load(tmp_path, tokenizer=plain, seq_len=6)) == b"aa\n\nbb"
    without_end = Bytes()
    without_end.eos_token_id = None
    assert texts(load(tmp_path, tokenizer=without_end, seq_len=6)) == b"aa\n\nbb"


def test_limited_documents_are_drawn_by_seed_and_read_only_as_needed(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}" * 10)
    tokenizer = Bytes()
    tokens = load(tmp_path, samples=3, tokenizer=tokenizer)
    assert len(tokenizer.calls) == 1
    np.testing.assert_array_equal(tokens, load(tmp_path, samples=3))
    others = {texts(load(tmp_path, samples=3, seed=seed)) for seed in range(8)}
    assert len(others) > 1


def test_document_tokens_takes_the_beginning_of_each(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name.upper() + name * 50)
    tokens = load(tmp_path, seq_len=9, document_tokens=4)
    assert texts(tokens) == b"Aaaa\0Bbbb"


def test_long_text_is_not_tokenised_to_its_end(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(200_000))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = Bytes()
    tokens = load(tmp_path / "a.txt", samples=5, tokenizer=tokenizer)
    assert texts(tokens) == text[:20].encode()
    assert max(map(len, tokenizer.calls)) < 10_000


def test_few_ids_per_character_still_give_every_window(tmp_path):
    """A tokenizer with very long tokens, for which the first part of a text is too short."""

    class Sparse(Bytes):
        def encode(self, text, *, add_special_tokens):
            return [1] * (len(text) // 1000)

    (tmp_path / "a.txt").write_text("x" * 100_000)
    assert load(tmp_path / "a.txt", samples=10, tokenizer=Sparse()).shape == (10, 4)


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    # A line separator inside a string does not end a line of jsonl.
    path.write_text(json.dumps({"text": "a\u2028b"}, ensure_ascii=False) + '\n{"text": "cd"}\n')
    assert texts(load(path, seq_len=8)) == "a\u2028b\0cd".encode()


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabcd")
    assert texts(load(tmp_path / "a.txt")) == b"abcd"


def test_list_of_files(tmp_path):
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for path in paths:
        path.write_text(path.stem * 2)
    assert texts(load(paths, seq_len=5)) == b"bb\0aa"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_array_is_cut_to_the_window(tmp_path, dtype):
    array = np.arange(30, dtype=dtype).reshape(3, 10)
    np.save(tmp_path / "a.npy", array)
    tokens = load(tmp_path / "a.npy", seq_len=7, samples=2, tokenizer=None)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, array[:2, :7])
    assert array_length(tmp_path / "a.npy") == 10
    assert array_length(tmp_path / "b.npy") is None
    assert array_length(tmp_path) is None


def test_fingerprint_is_of_the_ids_only():
    tokens = np.array([[1, 2], [3, 4]], np.int32)
    expected = hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in (1, 2, 3, 4))).hexdigest()
    assert fingerprint(tokens) == expected
    assert fingerprint(tokens.astype(np.int64)) == expected
    assert fingerprint(np.asfortranarray(tokens)) == expected


def test_standard_library_is_split_by_letter():
    early, late = standard_library("a", "m"), standard_library("n", "z")
    assert early
    assert late
    assert not set(early) & set(late)
    assert standard_library() == sorted(early + late)
    assert any(path.name == "argparse.py" for path in early)
    assert not any({"test", "site-packages"} & set(path.parts) for path in early + late)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: no text"),
        ("short.txt", b"abc", r"short\.txt: 3 tokens.*window of 4.*--seq-len"),
        ("latin.txt", b"abcd\xe9fgh", r"latin\.txt: byte 0xe9 at offset 4.*UTF-8"),
        ("a.jsonl", b'{"text": "abcd"}\n{"body": "x"}\n', r'line 2: no "text"'),
        ("b.jsonl", b'{"text": "abcd"}\n{"text": 3}\n', r'line 2: no "text"'),
        ("c.jsonl", b'{"text": "abcd"}\n\nabc\n', r"line 3: not JSON"),
        ("d.jsonl", b'["text"]\n', r'line 1: no "text"'),
        ("a.npy", b"\x93NUMPY\x01\x00", r"a\.npy: cannot be read.*integer token ids"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8), np.float32), r"float32 \[2, 8\]; expected"),
        (np.zeros((2, 8), bool), r"bool \[2, 8\]; expected"),
        (np.zeros(8, np.int32), r"int32 \[8\]; expected"),
        (np.zeros((0, 8), np.int32), "expected"),
        (np.zeros((2, 3), np.int32), "rows of 3 ids, fewer than one window of 4"),
        (np.array([[0, 1, 2, 3], [0, 1, 256, 3]]), r"id 256 at window 1, position 2.*0 to 255"),
        (np.array([[0, -1, 2, 3]]), r"id -1 at window 0, position 1"),
        (np.array([[0, 2**32, 2, 3]]), r"id 4294967296 at window 0"),
        (np.array([["a", "b"]], object), "cannot be read"),
    ],
)
def test_bad_array(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npy", tokenizer=None)


def test_tokenizer_of_a_larger_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    with pytest.raises(ValueError, match=r"id 101 at window 1, position 0.*0 to 100"):
        load(tmp_path / "a.txt", vocab_size=101)


def test_missing_path_and_missing_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt: no such file"):
        load(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="no text file in it"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("abcdefgh")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        load(tmp_path / "a.txt", tokenizer=None)


@pytest.mark.parametrize("options", [{"seq_len": 1}, {"seq_len": 0}, {"samples": 0}])
def test_bad_sizes(tmp_path, options):
    (tmp_path / "a.txt").write_text("abcdefgh")
    with pytest.raises(ValueError, match="expected"):
        load(tmp_path / "a.txt", **options)
